"""Label-free restarts: several networks begin, and the one whose classes the others confirm goes on.

Classes settle early, and not always well: one kind of image may fill two classes while two share one. Good
networks find nearly the same classes; bad ones differ from them and from each other. So agreement tells them
apart without labels. The loss does so less often: some bad classes have a lower one.
"""

import io

import torch
import torch.distributed as dist

from checkpoint import UserError
from cluster_eval import evaluate
from data import Batches
from loss import all_gather, twist_loss
from model import build_network, zero_init_residual
from optim import load_optimizer


class Restarts:
    """Of `args.restarts` candidates, the best after 3/8 of the schedule takes the rest of it.

        restarts = Restarts(args, config, batches, total_steps, device, model, teacher, optimizer)
        run.track(..., restarts=restarts)                # a resumed run knows the best one so far
        for _ in run.steps():
            step = restarts.begin(run)                   # of the schedule

    The run has as many steps as without restarts, so its schedule is shorter: for 4 candidates 8/17 of them.
    """

    def __init__(self, args, config, batches, total_steps, device, model, teacher, optimizer):
        self.args, self.config, self.batches, self.device = args, config, batches, device
        self.count = args.restarts
        self.trial = 3 * total_steps // (3 * self.count + 5)        # steps of a candidate
        self.total_steps, self.schedule_steps = total_steps, total_steps - (self.count - 1) * self.trial
        self.networks = [model] if teacher is None else [model, teacher]
        self.optimizer = optimizer
        self.ended = []                                  # of each: loss, classes of images, states

    def schedule_steps_after(self, warmup_steps):
        """The steps of the schedule. Raises UserError if only the whole run is longer than the warm-up."""
        if self.schedule_steps <= warmup_steps < self.total_steps:
            raise UserError(f"--warmup-epochs: is {warmup_steps} steps, but with --restarts {self.count} a "
                            f"schedule has {self.schedule_steps}; choose fewer of either")
        return self.schedule_steps

    def begin(self, run):
        """The step of the schedule at the run's step. Where a candidate ends, the next takes its place."""
        if self.count == 1 or self.trial == 0:
            return run.step
        ended, rest = divmod(run.step, self.trial)       # candidates that have ended, steps since then
        if rest == 0 and 0 < ended <= self.count:
            self.keep(ended, run)
            if ended < self.count:
                self.begin_anew(ended)
            else:
                self.go_on(run)
        return run.step - self.trial * min(ended, self.count - 1)

    def begin_anew(self, candidate):
        """Gives the networks the initial weights of a new candidate, and the optimizer a new state."""
        with torch.random.fork_rng(devices=()):          # the noise of a network does not depend on it
            torch.default_generator.manual_seed(self.args.seed + 1000 * candidate)       # not those of GPUs
            new = build_network(self.config, self.args.drop_path)
        if self.args.zero_init_residual:
            zero_init_residual(new.backbone)
        for network in self.networks:
            network.load_state_dict(new.state_dict())
        self.optimizer.state.clear()
        self.optimizer.zero_grad()

    def keep(self, number, run):
        """Remembers the candidate that has just ended."""
        # before on_fresh_views, which moves the running statistics; as bytes, which take no memory of a GPU
        states = io.BytesIO()
        torch.save([part.state_dict() for part in (*self.networks, self.optimizer)], states)
        states = torch.frombuffer(states.getbuffer(), dtype=torch.uint8)
        loss, classes = on_fresh_views(self.networks[0], self.batches, self.args, self.device)
        run.say(f"candidate {number} of {self.count}: loss {loss:.4f} on fresh views")
        run.write(dict(step=run.step, candidate=number, fresh_views_loss=loss))
        self.ended.append(dict(loss=loss, classes=classes, states=states))

    def go_on(self, run):
        """Returns to the candidate that agrees most with the others; of equals, to the lowest loss."""
        shares = agreement([candidate["classes"] for candidate in self.ended])
        best = max(range(self.count), key=lambda i: (shares[i], -self.ended[i]["loss"]))
        run.say("agreement with the others {}: candidate {} goes on".format(
            " ".join(f"{share:.3f}" for share in shares), best + 1))
        run.write(dict(step=run.step, agreement=shares, chosen=best + 1))
        states = io.BytesIO(self.ended[best]["states"].numpy())
        *states, optimizer_state = torch.load(states, map_location=self.device, weights_only=True)
        for network, state in zip(self.networks, states, strict=True):
            network.load_state_dict(state)
        load_optimizer(self.optimizer, optimizer_state)
        self.ended = []

    def state_dict(self):
        return self.ended

    def load_state_dict(self, state):
        # of 0.7.0, whose candidates took 5/8, or of 0.9.0, which kept them in another form
        if self.count > 1 and (isinstance(state, dict) or any(type(c["states"]) is list for c in state)):
            raise UserError("--resume: version 0.9.0 or older began this run, with other candidates; go on "
                            "with that version, or start anew with --overwrite")
        self.ended = list(state)


def agreement(classes):
    """For each of n networks the mean over the others of the share of images that both put into one class.

    classes: n tensors [N] of ids. Networks number their classes differently; cluster_eval.evaluate matches
    them one to one, as it does clusters and true classes. Returns n numbers from 0 to 1.
    """
    agreements = []
    for a in classes:
        shares = [evaluate(a.numpy(), b.numpy())["acc"] for b in classes]
        agreements.append((sum(shares) - 1) / (len(classes) - 1))          # without that with itself, 1
    return agreements


@torch.no_grad()
def on_fresh_views(model, batches, args, device, num_images=2048):
    """(TWIST's loss, classes [N]) of two new views of about num_images training images.

    The loss is a number; the class is that of the mean of both views. The model stays in training mode, since
    running statistics lag behind after a few steps. Under DDP each rank takes its share; all get the same.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    views = batches.views
    fresh = Batches(batches.dataset, args.batch_size, views, args.seed + 1_000_000, rank, world_size,
                    batches.crop_on)
    logits = []
    for step in range(max(1, min(num_images, len(batches.dataset)) // args.batch_size)):
        images, uniforms, _ = fresh[step]
        logits.append(model(views(images, uniforms, device)[:2]))                 # [2, B, C]
    logits = torch.cat(logits, 1)                                                 # [2, N, C]
    classes = logits.softmax(-1).mean(0).argmax(-1)
    if world_size > 1:
        classes = all_gather(classes).flatten()
    return twist_loss(logits, args.alpha, args.beta, args.eps).total.item(), classes.cpu()

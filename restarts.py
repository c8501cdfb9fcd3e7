"""Label-free restarts: several networks begin, and the one with the lowest loss goes on.

Classes settle early, and not always well: one kind of image may fill two classes while two share one. TWIST's
loss is higher there, so it tells good beginnings from bad ones without labels.
"""

import copy

import torch
import torch.distributed as dist

from data import Batches
from loss import twist_loss
from model import build_network, zero_init_residual
from optim import load_optimizer


class Restarts:
    """Of `args.restarts` candidates, the best after 5/8 of the schedule takes the rest of it.

        restarts = Restarts(args, config, batches, total_steps, device, model, teacher, optimizer)
        run.track(..., restarts=restarts)                # a resumed run knows the best one so far
        for _ in run.steps():
            step = restarts.begin(run)                   # of the schedule, which has restarts.schedule_steps

    The run has as many steps as without restarts, so its schedule is shorter: for 3 candidates 4/9 of them.
    Earlier than at 5/8, say at 1/2, a good network may still have a higher loss than a bad one.
    """

    def __init__(self, args, config, batches, total_steps, device, model, teacher, optimizer):
        self.args, self.config, self.batches, self.device = args, config, batches, device
        self.count = args.restarts
        self.trial = 5 * total_steps // (5 * self.count + 3)        # steps of a candidate
        self.schedule_steps = total_steps - (self.count - 1) * self.trial
        self.networks = [model] if teacher is None else [model, teacher]
        self.optimizer = optimizer
        self.best = {}                                   # of the candidates that have ended

    def begin(self, run):
        """The step of the schedule that the run's step is. Where a candidate ends, the parts change."""
        if self.count == 1 or self.trial == 0:
            return run.step
        ended, rest = divmod(run.step, self.trial)       # candidates that have ended, steps since then
        if rest == 0 and 0 < ended <= self.count:
            self.compare(ended, run)
            if ended < self.count:
                self.begin_anew(ended)
            else:
                self.go_on(run)
        return run.step - self.trial * min(ended, self.count - 1)

    def begin_anew(self, candidate):
        """Gives the networks the initial weights of a new candidate."""
        with torch.random.fork_rng(devices=()):          # the noise of a network does not depend on it
            torch.manual_seed(self.args.seed + 1000 * candidate)
            new = build_network(self.config, self.args.drop_path)
        if self.args.zero_init_residual:
            zero_init_residual(new.backbone)
        for network in self.networks:
            network.load_state_dict(new.state_dict())
        self.optimizer.state.clear()

    def compare(self, number, run):
        """Remembers the candidate that has just ended if its loss is the lowest so far."""
        # copied first, because the loss moves the running statistics
        states = copy.deepcopy([part.state_dict() for part in (*self.networks, self.optimizer)])
        loss = loss_on_fresh_views(self.networks[0], self.batches, self.args, self.device)
        run.say(f"candidate {number} of {self.count}: loss {loss:.4f} on fresh views")
        run.write(dict(step=run.step, candidate=number, fresh_views_loss=loss))
        if not self.best or loss < self.best["loss"]:
            self.best = dict(number=number, loss=loss, states=states)

    def go_on(self, run):
        """Returns to the best candidate."""
        run.say(f"candidate {self.best['number']} goes on")
        run.write(dict(step=run.step, chosen=self.best["number"]))
        *states, optimizer_state = self.best["states"]
        for network, state in zip(self.networks, states, strict=True):
            network.load_state_dict(state)
        load_optimizer(self.optimizer, optimizer_state)
        self.best = {}

    def state_dict(self):
        return self.best

    def load_state_dict(self, state):
        self.best = state


@torch.no_grad()
def loss_on_fresh_views(model, batches, args, device, num_images=2048):
    """TWIST's loss of two views of each image, which the model is not trained on, a number.

    The model stays in training mode, since running statistics lag behind after a few steps. Under DDP each
    rank takes its share, and all get the same number.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    views = batches.views
    fresh = Batches(batches.dataset, args.batch_size, views, args.seed + 1_000_000, rank, world_size)
    logits = []
    for step in range(max(1, min(num_images, len(batches.dataset)) // args.batch_size)):
        images, uniforms, _ = fresh[step]
        logits.append(model(views(images, uniforms, device)[:2]))                 # [2, B, C]
    return twist_loss(torch.cat(logits, 1), args.alpha, args.beta, args.eps).total.item()

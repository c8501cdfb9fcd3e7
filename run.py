"""What surrounds training: `Run`, with its folder, checkpoints, log and signals; folders of evaluations.

A stage calls its Run; a Run never calls the stage. A copied script does without it if the loop counts the
steps itself, reads `next(loader)`, and drops the other calls.
"""

import atexit
import io
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import time
from contextlib import contextmanager, suppress
from multiprocessing.util import register_after_fork
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoint import (
    UserError,
    is_ours,
    load_checkpoint,
    load_last_checkpoint,
    save_checkpoint,
    to_stderr,
    to_stdout,
    write_atomically,
)
from data import input_of
from optim import load_optimizer
from pretrained import description

try:
    import fcntl
    import resource
except ImportError:              # Windows has neither, and no SIGUSR1
    fcntl = resource = None

SIGNALS = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM))
MOST_OVERFLOWS = 20              # of fp16, in a row: a scale 2^20 times smaller did not help
CHECK_EVERY = 50                 # the ranks agree at least every so many steps
# Flags of where and how fast a run computes, its rounding and its log: they may differ when it resumes.
FREE_FLAGS = {"workers", "print_every", "save_every", "knn_every", "device", "amp", "output_dir", "timeout",
              "resume", "overwrite", "data_dir"}
OF_FILES = {"pictures", "labels_sha256", "backbone_sha256", "teacher_sha256"}    # settings that files tell
RUN_FILES = ("config.json", "checkpoint.pth", "checkpoint.prev.pth", "backbone.pth", "backbone_student.pth",
             "backbone.json", "backbone_student.json", "log.jsonl", "metrics.json", "curves.png", "head.pth",
             "predictions.csv", "labels.txt", "checkpoint.damaged.pth", "report.html", "comparison.html",
             "segmentation.png", "detections.png", "detections.json")


# ---------------------------------------------------------------- a training run
class Run:
    """The folder, checkpoints, log and signals of a training run.

        run = Run(args, "pretrain", device, total_steps, steps_per_epoch)
        run.track(model=model, optimizer=optimizer)      # loads the folder's last checkpoint
        for step in run.steps():                         # from where it stopped
            images, ... = run.next(loader)
            ...                                          # one training step
            run.watch(loss, norm)
            if run.logging:
                run.log("loss {loss:.3f}", loss=..., lr=...)
        run.done()

    A checkpoint is saved every --save-every steps and after the last one. A loss, gradient or weight that is
    not finite ends the process with code 3, a signal with 128 + its number, after saving. All ranks agree on
    that by one small collective at steps that log or save, and at least every 50 steps; a single process
    answers a signal after the step that it is in. A second signal ends the process at once.
    """

    def __init__(self, args, stage, device, total_steps, steps_per_epoch, config=None, last=True):
        """config: what a resumed run must have in common with this one; default: the flags.

        last: False if the process goes on with another run where this one is done (0) or not finite (3).
        """
        self.args, self.stage, self.device, self.out = args, stage, device, Path(args.output_dir)
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.config = vars(args) if config is None else config
        if not is_ours(dict(model={}, config=self.config)):
            raise TypeError(f"config: holds more than numbers, texts and flat lists of these: {self.config}")
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        found = [None, False]                            # checkpoint; whether all is done
        if self.rank == 0:
            # the lock is released when nobody refers to it any more, so it stays an attribute
            self.lock, found[0] = open_output(args, stage, self.config)
            found[1] = (self.out / "metrics.json").exists()
        if self.world_size > 1:                          # other machines may not have rank 0's folder
            dist.broadcast_object_list(found)
        self.state, self.finished = found
        self.start, self.step, self.left_early, self.parts = 0, -1, False, {}
        amp_before = self.state["config"].get("amp", args.amp) if self.state else args.amp
        self.amp = args.amp if amp_before == args.amp else f"{args.amp} (was {amp_before})"
        self.caught, self.asked, self.stopped_by, self.waited = [], 0.0, None, 0.0
        self.training, self.code, self.pid = True, None, os.getpid()     # code: set where the process ends
        self.last = last
        self.bad_step = torch.full((), -1, device=device)        # the first one that is not finite
        self.bad_loss = torch.zeros((), dtype=torch.bool, device=device)         # else its gradient was not
        self.overflows = torch.zeros((), dtype=torch.long, device=device)        # of fp16, in a row
        self.last_terms, self.lrs = None, {}

    # ---- checkpoints
    def track(self, **parts):
        """Names the parts of a checkpoint and loads them if the run resumes.

        parts: modules, optimizers, scalers, ... with a state_dict, or tensors; None is left out. `model` and
        `optimizer` are needed. `run.backbone` is that of `teacher`, else of `model`, and is written to
        backbone.pth.
        """
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.backbone = getattr(self.parts.get("teacher", self.parts["model"]), "backbone", None)
        if self.state is not None:
            with refuse_misfit(self.args):
                self.start, self.left_early = int(self.state["step"]), bool(self.state.get("left_early"))
                for name, part in self.parts.items():
                    if isinstance(part, torch.Tensor):
                        part.copy_(torch.as_tensor(self.state[name]))
                    elif name == "optimizer":
                        load_optimizer(part, self.state[name])
                    elif self.state[name] or name != "scaler":       # a run without fp16 has no scale
                        part.load_state_dict(self.state[name])
                states = self.state.get("rng", ())
                if len(states) == self.world_size:       # else a rank's noise is drawn anew
                    set_rng_state(states[self.rank], self.device)
            self.state = None                            # the memory is the parts' now
        is_last = self.start == self.total_steps or self.left_early
        if is_last and (self.finished or self.args.resume != "auto"):
            self.say(f"{self.out}: this run is finished; --overwrite starts it anew")
            self.end(0)
        self.say(shlex.join(["python", *sys.argv]))

    def save(self):
        """Writes checkpoint.pth, and where the model has a backbone, backbone.pth and its description.

        With a teacher, backbone.pth is the teacher's, and backbone_student.pth is the student's.
        """
        rng = [rng_state(self.device)] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(rng, rng_state(self.device))
        if self.rank > 0:
            return
        backbones = {} if self.backbone is None else {"backbone": self.backbone}
        if "teacher" in self.parts:
            backbones["backbone_student"] = self.parts["model"].backbone
        for name, backbone in backbones.items():         # the description first, so that it is never missing
            if "arch" in self.config:
                write_atomically(self.out / f"{name}.json", description(self.config, *input_of(self.config)))
            write_atomically(self.out / f"{name}.pth", backbone.state_dict())
        state = dict(step=self.step + 1, epoch=(self.step + 1) // self.steps_per_epoch, stage=self.stage,
                     rng=rng, config=self.config, left_early=self.left_early)
        for name, part in self.parts.items():
            state[name] = part if isinstance(part, torch.Tensor) else part.state_dict()
        save_checkpoint(self.out / "checkpoint.pth", state)

    # ---- steps
    def steps(self):
        """Yields the number of each step that is left, counted from 0.

        Before each: `logging`, `saving`, `epoch_ends` (bool) and `epoch` (from 1) of this step are set.
        """
        if self.rank == 0:
            self.file = open_log(self.out / "log.jsonl")
            config = dict(self.config, device=str(self.device), world_size=self.world_size,
                          steps_per_epoch=self.steps_per_epoch, total_steps=self.total_steps)
            command = shlex.join(["python", *sys.argv])
            self.write(dict(resumed_from=self.start) if self.start else dict(command=command, config=config))
        resumed = f"; resumed from step {self.start}" if self.start else ""
        self.say(f"{self.total_steps - self.start:,} steps to go; {self.world_size} process(es) on "
                 f"{self.device}, amp {self.amp}{resumed}")
        for signum in SIGNALS:
            signal.signal(signum, self.answer)
        self.since, self.logged, self.step = time.time(), self.start, self.start - 1
        for step in range(self.start, self.total_steps):
            self.step, done = step, step + 1
            self.epoch = step // self.steps_per_epoch + 1
            self.epoch_ends = done % self.steps_per_epoch == 0
            self.logging = done % self.args.print_every == 0 or self.epoch_ends
            self.saving = done % self.args.save_every == 0 or done == self.total_steps
            yield step
            if self.logging:             # the next rate is without what a stage scored and drew here
                self.since = time.time()
            if step == self.start and not self.logging:  # the first line of progress may take minutes
                self.say(f"first step done after {time.time() - self.since:.1f} s", keep=False)
            if self.saving or self.stopped_by:
                self.save()
            if self.stopped_by:
                self.write(dict(step=done, status=f"stopped by {self.stopped_by.name}, saved"))
                self.say(f"stopped by {self.stopped_by.name} after step {done}, saved; "
                         "the same command resumes")
                self.end(128 + self.stopped_by)
        self.training = False
        if self.caught:                                  # during the last save
            self.end_at_once(self.caught[0])

    def answer(self, signum, frame):
        """Handles a signal: the first is answered after a step, one more, or one after training, at once."""
        if os.getpid() != self.pid:                      # a data-loader worker, which inherits the handler
            return
        if self.training and not self.caught:
            self.caught.append(signum)
            self.asked = time.time()
            steps = min(CHECK_EVERY, self.args.print_every, self.args.save_every)
            when = "this step" if self.world_size == 1 else f"at most {steps} steps"
            self.shout(f"{signal.Signals(signum).name}: stopping after {when}; once more ends at once")
        elif not self.training or time.time() - self.asked > 1:        # a launcher may repeat a terminal's
            self.end_at_once(signum)

    def end_at_once(self, signum):
        """Ends this process and its workers without saving; the other ranks notice that it is gone."""
        if self.code is None:
            name = signal.Signals(signum).name
            with suppress(OSError):                      # the disk may be full
                self.write(dict(step=self.step + 1, status=f"stopped by {name} at once"))
            self.shout(f"stopped by {name} at once; the same command resumes from the last checkpoint")
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(128 + signum if self.code is None else self.code)

    def shout(self, line):
        """Prints a line from a handler of signals, where print() may fail because it is running already."""
        if self.rank == 0:
            with suppress(OSError):
                os.write(1, b"\n" * sys.stdout.isatty() + f"{line}\n".encode())

    def next(self, loader):
        """next(loader). The log tells which share of the time a run waits for its loader (`waiting`)."""
        before = time.time()
        batch = next(loader)
        self.waited += time.time() - before
        return batch

    @staticmethod
    def read_later(value):
        """A function that returns a number of the device; it waits for the work so far, not for later work.

        So the device has the backward pass to do while this process waits, and never runs out of work.
        """
        copied = torch.cuda.Event() if value.is_cuda else None
        value = value.to("cpu", non_blocking=value.is_cuda)      # MPS has no event to wait for
        if copied:
            copied.record()

        def read():
            if copied:
                copied.synchronize()
            return value.item()
        return read

    @torch.no_grad()
    def watch(self, loss, norm=None):
        """Remembers the first step with a number that is not finite. Call it at the end of every step.

        loss: a scalar, or a NamedTuple of scalars. norm: of the gradient; with fp16 a few in a row may
        overflow. Nothing here waits for the device, but at the steps where the ranks agree.
        """
        terms = torch.stack([*loss]) if isinstance(loss, tuple) else loss[None]
        terms, fp16 = terms.detach().float(), "scaler" in self.parts and self.parts["scaler"].is_enabled()
        finite = terms.isfinite().all()
        if norm is not None:
            self.overflows = torch.where(norm.isfinite(), 0, self.overflows + 1)
            finite = finite & (self.overflows < (MOST_OVERFLOWS if fp16 else 1))
        good_so_far = self.bad_step < 0
        last = terms if self.last_terms is None else self.last_terms
        self.last_terms = torch.where(good_so_far & finite, terms, last)
        self.bad_loss = torch.where(good_so_far, ~terms.isfinite().all(), self.bad_loss)
        self.bad_step = torch.where(good_so_far & ~finite, self.step + 1, self.bad_step)
        self.lrs[self.step + 1] = self.parts["optimizer"].param_groups[0]["lr"]
        heard = self.world_size == 1 and self.caught
        if self.logging or self.saving or (self.step + 1) % CHECK_EVERY == 0 or heard:
            self.agree(getattr(loss, "_fields", ("loss",)), weights=norm is not None)
            self.seconds = time.time() - self.since      # the device has caught up here, so this is right

    def agree(self, names, weights):
        """All ranks learn what one has seen. Ends the run if that was a number that is not finite."""
        sound = torch.ones((), dtype=torch.bool, device=self.device)
        if weights:
            sound = torch.stack([w.isfinite().all() for w in self.parts["model"].parameters()]).all()
        caught = [float(signum in self.caught) for signum in SIGNALS]
        # the ranks take a maximum, and of several bad steps the first has the most steps to go
        to_go = torch.where(self.bad_step < 0, 0, self.total_steps + 1 - self.bad_step)
        seen = torch.stack([to_go, self.bad_loss, ~sound]).float()
        seen = torch.cat([torch.tensor(caught, device=self.device), seen])
        if self.world_size > 1:
            dist.all_reduce(seen, dist.ReduceOp.MAX)
        *heard, to_go, bad_loss, bad_weights = seen.tolist()             # by any rank
        if to_go > 0 or bad_weights:
            step, what = self.step + 1, "weights are"
            if to_go > 0:                                # of the first bad step
                step, what = self.total_steps + 1 - int(to_go), "loss is" if bad_loss else "gradient is"
            terms = ", ".join(f"{name} {value:.4g}" for name, value in
                              zip(names, self.last_terms.tolist(), strict=True))
            self.write(dict(step=step, status=f"non-finite {what.split()[0]}"))
            terms = f", last finite {terms}" if step > self.start + 1 else ""
            kept = f"the checkpoint in {self.out} is from before"
            if not (self.out / "checkpoint.pth").exists():
                kept = "nothing is saved yet"
            self.end(3, f"at step {step} the {what} not finite (lr {self.lrs[step]:.3g}, amp "
                        f"{self.args.amp}{terms}); {kept}; try a lower learning rate")
        self.lrs.clear()
        self.stopped_by = next((s for s, sent in zip(SIGNALS, heard, strict=True) if sent), None)

    # ---- the log
    def log(self, line, **numbers):
        """Adds a line of numbers to log.jsonl and prints one to read.

        line: a format string of those numbers that a reader watches. Speed and time to go are added here, or
        instead of them what has collapsed, if `collapsed` is among the numbers.
        """
        done = self.step + 1
        rate = (done - self.logged) * self.args.batch_size / self.seconds
        entry = dict(epoch=self.epoch, step=done, **numbers, images_per_s=round(rate, 1),
                     waiting=round(self.waited / self.seconds, 4), memory_mib=memory_mib(self.device))
        self.write(entry)
        eta = round((self.total_steps - done) * self.args.batch_size / rate)
        minutes, hours = f"{eta // 60}:{eta % 60:02}", f"{eta // 3600}h{eta // 60 % 60:02}"
        tail = f"{rate:.0f} images/s, ETA {hours if eta >= 3600 else minutes}"
        if "collapsed" in numbers:
            tail = f"collapsed: {numbers['collapsed']}"
        self.say(f"step {done}/{self.total_steps} | {line.format(**numbers)} | {tail}",
                 keep=self.epoch_ends or "collapsed" in numbers)
        self.logged, self.waited = done, 0.0

    def average(self, **tensors):
        """{name: tensor on the CPU}: means of each tensor over the ranks, by one collective."""
        flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors.values()])
        if self.world_size > 1:
            dist.all_reduce(flat)
            flat /= self.world_size
        parts = flat.cpu().split([tensor.numel() for tensor in tensors.values()])
        return {name: part.view(tensor.shape)
                for (name, tensor), part in zip(tensors.items(), parts, strict=True)}

    def entries(self):
        """The training lines of the log so far, a list of dicts by step."""
        entries = read_log(self.out / "log.jsonl")       # not by step if a resumed run printed more often
        return [entries[step] for step in sorted(entries)]

    def write(self, entry):
        """Appends an entry to log.jsonl."""
        if self.rank == 0:
            self.file.write(json.dumps(entry) + "\n")

    def say(self, line, keep=True):
        """Prints a line, once for all ranks. On a terminal the next one replaces it unless it is to keep."""
        if self.rank > 0:
            return
        if not sys.stdout.isatty():
            to_stdout(line)
        elif keep:
            to_stdout(f"\r\033[K{line}")
        else:
            width = shutil.get_terminal_size().columns - 1       # a line that wraps cannot be replaced
            to_stdout(f"\r\033[K{line[:width]}", end="")

    # ---- the end
    def done(self, metrics=None, files=()):
        """Writes metrics.json (default: the last line of the log) and ends the process with code 0.

        metrics.json says that a run is finished, so it is written last. files: others that the stage wrote.
        A loop that was left early, by all ranks in one step, is saved first.
        """
        steps = self.step + 1
        if 0 < steps < self.total_steps:
            self.left_early = True
            self.save()
        if self.rank == 0:
            # a crash of the machine may have cost the log its last lines; `step` tells what is left
            metrics = metrics or [dict(step=self.total_steps), *self.entries()][-1]
            write_atomically(self.out / "metrics.json", json.dumps(metrics, indent=1).encode())
            self.write(dict(step=steps or self.total_steps, status="done"))
            names = ("checkpoint.pth", "backbone.pth", "log.jsonl", "metrics.json", *files)
            written = [name for name in names if (self.out / name).exists()]
            self.say(f"done: {', '.join(written)} in {self.out}")
        self.end(0)

    def end(self, code, message=None):
        """Ends all ranks together, so that none mistakes another's exit for a crash."""
        goes_on = not self.last and code in (0, 3)
        self.code = None if goes_on else code
        self.training = self.training and not goes_on    # until the next run, a signal ends it at once
        if message and self.rank == 0:
            self.say(f"ended at step {self.step + 1}")
            to_stderr(f"{self.stage}.py: error: {message}")
        if dist.is_initialized():
            dist.barrier()
            if self.code is not None:
                dist.destroy_process_group()
        sys.exit(code)


def rng_state(device):
    """States of the generators that a network's noise (drop path, dropout) comes from, a list of tensors."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_rng_state(states, device):
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def memory_mib(device):
    """Peak memory so far: of the CUDA device, else of this process, 0 on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    if resource is None:
        return 0
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


# ---------------------------------------------------------------- the output folder
def open_output(args, stage, config):
    """Makes and locks args.output_dir; returns (lock, checkpoint to resume from or None). For rank 0.

    Nothing is written before it is known that the folder is not in use, holds nobody else's files, and
    that its run has this configuration. A run that never saved is begun anew, whatever its flags were.
    Raises UserError.
    """
    out, lock, state = Path(args.output_dir), None, None
    config = dict(config, stage=stage)
    if out.exists() and not out.is_dir():
        raise UserError(f"--output-dir {out}: is not a folder; choose another name")
    if out.is_dir():
        lock = _lock(out)
        there = [name for name in RUN_FILES if (out / name).exists()]
        if there and not args.overwrite:
            if not {"config.json", "checkpoint.pth", "checkpoint.prev.pth"} & set(there):
                raise UserError(f"--output-dir {out}: holds {there[0]}, which no run wrote; choose another, "
                                "or --overwrite replaces it")
            if args.resume == "never":
                raise UserError(f"--output-dir {out}: holds a run already; choose another or add --overwrite")
            state = load_last_checkpoint(out)
            if state is not None:
                refuse_difference(state, config, out)
    if args.resume not in ("auto", "never"):
        state = load_checkpoint(args.resume)
        refuse_difference(state, config, args.resume)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = lock or _lock(out)
        if state is None or args.overwrite:
            for name in RUN_FILES[1:]:
                (out / name).unlink(missing_ok=True)
        write_atomically(out / "config.json", json.dumps(config, indent=1).encode())
    except OSError as error:
        raise UserError(f"--output-dir {out}: cannot be written ({error.strerror}); choose another") from None
    return lock, state


def _lock(out):
    try:
        lock = open(out / ".lock", "a")
    except OSError as error:
        raise UserError(f"--output-dir {out}: cannot be written ({error.strerror}); choose another") from None
    try:
        if fcntl is None:
            import msvcrt
            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"--output-dir {out}: another run is using this folder; choose another") from None
    except OSError as error:     # some network file systems have no locks
        to_stderr(f"warning: {out} cannot be locked ({error.strerror}): make sure that no other run uses it")
    # workers inherit the open file, and those of a killed run outlive it by seconds
    register_after_fork(lock, io.TextIOWrapper.close)
    return lock


def refuse_difference(state, config, where):
    """Raises UserError that names the settings in which a checkpoint differs from the run that resumes it."""
    before = {**state["config"], "stage": state.get("stage")}
    keys = sorted((before.keys() & config.keys()) - FREE_FLAGS)
    changed = [key for key in keys if before[key] != config[key]]
    if changed:
        different = "; ".join(f"{key} was {before[key]}, is {config[key]}" for key in changed)
        same = "put the files back as they were" if OF_FILES.issuperset(changed) else "use the same flags"
        remedy = f"{same}, another --output-dir, or --overwrite"
        if "init" in config and {"epochs", "data"} & {*changed}:
            remedy += f"; to go on with its weights, add --init {where} to another --output-dir"
        raise UserError(f"{where}: made with another configuration ({different}); {remedy}")


@contextmanager
def refuse_misfit(args):
    """While a checkpoint's parts are loaded: one that does not fit is a UserError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        said = str(error).strip().splitlines()[-1].strip() or type(error).__name__
        where = args.output_dir if args.resume == "auto" else args.resume
        raise UserError(f"{where}: its parts are not those of a run with these flags "
                        f"({type(error).__name__}: {said[:200]}); another --output-dir, or --overwrite, "
                        "starts anew") from None


def make_evaluation_folder(path):
    """The output folder of an evaluation; a new one that nothing is written into is removed at the end.

    Raises UserError if it holds a training run or cannot be made.
    """
    out = Path(path)

    def remove_if_empty():
        with suppress(OSError):
            out.rmdir()
    if not out.exists() and os.environ.get("RANK", "0") == "0":      # other ranks end before it writes
        atexit.register(remove_if_empty)
    if (out / "checkpoint.pth").exists():
        raise UserError(f"--output-dir {out}: holds a training run; choose another")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {out}: cannot be written ({error.strerror}); choose another") from None
    return out


def open_log(path):
    """log.jsonl, to append to; half a line that a killed run left is cut off."""
    log = open(path, "a+b", buffering=0)                 # a buffer would be left over when the disk is full
    log.seek(0)
    log.truncate(log.read().rfind(b"\n") + 1)
    return io.TextIOWrapper(log, write_through=True)


def read_log(path):
    """{step: entry} of the training lines of a log; the later of two with the same step.

    Lines that a crash of the machine left damaged are skipped.
    """
    entries = {}
    for line in Path(path).read_bytes().splitlines():
        with suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            entries |= {entry["step"]: entry} if "loss" in entry else {}
    return entries

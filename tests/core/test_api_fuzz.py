"""The rules hold after any sequence of calls, checked against books that are kept beside it."""

import collections
import copy
import functools
import io
import json
import pickle

import pytest
import torch
from core_helpers import (
    batch,
    buffers_of,
    changed,
    loss_of,
    optimizer_state_of,
    parameters_of,
    same_bits,
    small_model,
)
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from timm.layers import DropPath

from timm_rdp import ResidualDropPath
from timm_rdp.core.masks import sample_masks

pytestmark = pytest.mark.xdist_group("api fuzz")  # the last test tells what the others did

MODELS = {"test_vit": {"depth": 3}, "test_resnet": {}}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.001, weight_decay=0.05),
}
BLOCKS = ("blocks.1.", "blocks.2.attn", "layer2.", "layer4.0.bn2")
DONE = collections.Counter()

PHASES = ["droppath", "complement"]
MISUSES = ["stale", "nested", "not entered", "detach", "load", "frozen"]
COPIES = ["deepcopy", "pickle", "torch.save"]
INTERRUPTIONS = ["before the forward", "before backward", "after backward", "after the step"]
INTERRUPTED = [f"interrupted {when}" for when in INTERRUPTIONS]
REFUSED = [f"refused: {what}" for what in MISUSES]
interruptions = st.sampled_from([None, None, *INTERRUPTIONS])
digits = st.integers(0, 20)


class Interruption(BaseException):
    """As KeyboardInterrupt, which would end the test run."""


@functools.cache
def template(name):
    return small_model(name, **MODELS[name])


def drop_paths_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, DropPath)}


def carried_by(model, drop_path):
    """What the block's branch holds, by the names that timm gives its parts."""
    block, _, attribute = drop_path.rpartition(".")
    names = [n for n, _ in model.named_parameters() if n.startswith(f"{block}.")]
    if attribute == "drop_path":  # a ResNet's block, whose downsampling is the shortcut
        return {n for n in names if not n.startswith(f"{block}.downsample.")}
    parts = {"drop_path1": ("norm1", "attn", "ls1"), "drop_path2": ("norm2", "mlp", "ls2")}
    return {n for n in names if n.removeprefix(f"{block}.").startswith(parts[attribute])}


class Books:
    """Where the sequence ought to be, worked out from its definition."""

    def __init__(self, model, seed, every):
        self.seed, self.every = seed, every
        self.cycle, self.phase = 0, "droppath"
        self.dropped, self.masks = frozenset(), {}
        self.flags = {n: True for n, _ in model.named_parameters()}
        self.rates = {n: m.drop_prob for n, m in drop_paths_of(model).items()}
        self.carried = {n: carried_by(model, n) for n in self.rates}

    def dropped_part(self, dropped):
        return set().union(*(self.carried[n] for n in dropped))

    def free(self):
        return {n for n, flag in self.flags.items() if flag}

    def expected(self):
        """Phase, cycle, dropped paths and trainable parameters of the next iteration."""
        dropped = self.dropped
        if self.phase == "droppath":
            kept = sample_masks(self.seed, self.cycle, list(self.rates.values()))
            dropped = frozenset(n for n, k in zip(self.rates, kept, strict=True) if not k)
        carried = self.dropped_part(dropped)
        free = self.free()
        trainable = free - carried if self.phase == "droppath" else free & carried
        return self.phase, self.cycle, dropped, trainable

    def ask(self):
        """The same of the next one that trains anything; those before it are passed over."""
        while not self.expected()[3]:
            self.begin()
            self.complete()
        return self.expected()

    def begin(self):
        phase, _, dropped, _ = self.expected()
        if phase == "droppath":
            self.dropped = dropped
            self.masks = {n: n not in dropped for n in self.rates}

    def complete(self):
        follows = (self.cycle + 1) % self.every == 0
        if self.phase == "droppath" and follows and self.dropped_part(self.dropped) & self.free():
            self.phase = "complement"
        else:
            self.cycle, self.phase = self.cycle + 1, "droppath"


class Machine(RuleBasedStateMachine):
    name: str

    @initialize(
        seed=st.integers(0, 99),
        every=st.sampled_from([1, 1, 2]),
        kind=st.sampled_from([*OPTIMIZERS]),
    )
    def start(self, seed, every, kind):
        self.model = copy.deepcopy(template(self.name))
        self.plain = copy.deepcopy(template(self.name))  # never patched
        self.kind = kind
        self.optimizer = OPTIMIZERS[kind](self.model.parameters())
        self.books = Books(self.model, seed, every)
        self.rdp = ResidualDropPath(self.model, seed=seed, every=every)
        self.attached = False
        assert [p.name for p in self.rdp.paths] == [*self.books.rates]

    # What every call is checked against.

    def snapshot(self):
        return {
            "parameters": parameters_of(self.model),
            "optimizer": optimizer_state_of(self.optimizer, self.model),
            "buffers": buffers_of(self.model),
        }

    def check_kept(self, before, trainable, at_rest, stepped):
        """Frozen and dropped parts keep every bit; a step moves all that is to be trained."""
        after = self.snapshot()
        moved = changed(before["parameters"], after["parameters"])
        assert moved == (trainable if stepped else set())
        assert changed(before["optimizer"], after["optimizer"]) == moved
        owners = {n.rpartition(".")[0] for n in at_rest}
        buffers = changed(before["buffers"], after["buffers"])
        assert not {n for n in buffers if n.rpartition(".")[0] in owners}

    def train(self, model=None, digit=0, count=1):
        for i in range(count):
            loss_of(model or self.model, *batch(self.name, 2, digit + i)).backward()

    def step(self, to_none=True):
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=to_none)

    def check_masks(self, it):
        for name, module in drop_paths_of(self.model).items():
            told = it.phase == "complement" or self.books.masks[name]
            assert same_bits(module.masks, (torch.tensor(told),))

    def check_as_plain(self, model):
        """The same outputs and statistics as the model that was never patched."""
        images, _ = batch(self.name, 3)
        state = {n: t.clone() for n, t in model.state_dict().items()}
        self.plain.load_state_dict(state, strict=True)
        for name, module in drop_paths_of(self.plain).items():
            module.drop_prob = self.books.rates[name]
        results = []
        for each in (model, self.plain):
            torch.manual_seed(5)
            with torch.no_grad():
                results.append([each.train()(images), buffers_of(each), each.eval()(images)])
            each.train()
        assert same_bits(*results)
        model.load_state_dict(state)

    @invariant()
    def outside_iterations_the_model_is_the_plain_one(self):
        DONE["checks outside iterations"] += 1
        assert {n: p.requires_grad for n, p in self.model.named_parameters()} == self.books.flags
        assert all(m.training for m in self.model.modules())
        assert list(self.model.state_dict()) == list(self.plain.state_dict())
        hooked = [m for m in self.model.modules() if m._forward_pre_hooks or m._forward_hooks]
        begin = [self.model, self.model.get_submodule(self.rdp.paths[0].entrances[0])]
        assert hooked == (begin if self.attached else [])
        assert len(self.optimizer._optimizer_step_post_hooks) == self.attached
        self.check_as_plain(self.model)
        assert self.rdp.masks == self.books.masks

    # Iterations.

    def run(self, it, digit, interruption=None, micro=1, to_none=True, wander=False):
        """One iteration; its exception, if any, goes on."""
        expected = self.books.ask()
        assert (it.phase, it.cycle, it.dropped, it.trainable) == expected
        DONE[f"{it.phase} iterations"] += 1
        self.books.begin()
        before, stepped = self.snapshot(), False
        carried = self.books.dropped_part(it.dropped)

        def interrupt(now):
            if now == interruption:
                DONE[f"interrupted {now}"] += 1
                raise Interruption

        try:
            with it:
                interrupt("before the forward")
                if interruption == "before backward":
                    loss_of(self.model, *batch(self.name, 2, digit))
                interrupt("before backward")
                if wander:
                    self.wander()
                self.train(digit=digit, count=micro)
                if wander:
                    self.wander()
                else:
                    self.check_masks(it)
                interrupt("after backward")
                self.step(to_none)
                stepped = True
                interrupt("after the step")
            self.books.complete()
        finally:
            self.check_kept(
                before, it.trainable, carried if it.phase == "droppath" else (), stepped
            )

    def wander(self):
        """What a user may do in the middle of an iteration without taking part in it."""
        DONE["evaluated and copied within an iteration"] += 1
        images, _ = batch(self.name, 3)
        with torch.no_grad():
            outputs = self.model.eval()(images)
        self.plain.load_state_dict(self.model.state_dict())
        assert same_bits(outputs, self.plain.eval()(images))
        self.plain.train()
        self.model.train()
        twin = copy.deepcopy(self.model).train()
        self.check_as_plain(twin)
        assert dict(twin.named_parameters()).keys() == self.books.flags.keys()

    @rule(
        digit=digits,
        interruption=interruptions,
        micro=st.sampled_from([1, 1, 2]),
        to_none=st.booleans(),
        wander=st.booleans(),
    )
    def iteration(self, digit, interruption, micro, to_none, wander):
        DONE["iteration()"] += 1
        try:
            self.run(self.rdp.iteration(), digit, interruption, micro, to_none, wander)
        except Interruption:
            assert interruption

    @rule(digit=digits, interruption=interruptions, stop=st.sampled_from([None, None, 0, 1]))
    def a_cycle(self, digit, interruption, stop):
        """All of it, or left by `break` or an exception after `stop` iterations."""
        DONE["cycle()"] += 1
        cycle = self.books.cycle
        seen = 0
        try:
            for it in self.rdp.cycle():
                assert it.cycle == cycle
                if seen == stop:
                    DONE["cycle() left after its first iteration" if stop else "cycle() left"] += 1
                    self.books.ask()
                    return
                self.run(it, digit, interruption if seen == (digit % 2) else None)
                seen += 1
        except Interruption:
            return
        if self.books.cycle == cycle:  # nothing was left to train in it
            self.books.ask()
        assert self.books.cycle > cycle

    @rule(what=st.sampled_from(MISUSES))
    def misuse_is_refused_and_changes_nothing(self, what):
        DONE[f"refused: {what}"] += 1
        self.rdp.iteration()
        self.books.ask()
        before = self.snapshot()
        if what == "frozen":
            self.model.requires_grad_(False)
            with pytest.raises(RuntimeError, match="no parameter of the model requires"):
                self.rdp.iteration()
            self.restore_flags()
        elif what == "not entered":
            with pytest.raises(RuntimeError, match="was not entered"):
                for _ in self.rdp.cycle():
                    pass
        elif what == "stale":
            stale = self.rdp.iteration()
            self.run(self.rdp.iteration(), 0)
            with pytest.raises(RuntimeError, match="is over"), stale:
                raise AssertionError
            return
        else:
            self.books.begin()
            with pytest.raises(Interruption), self.rdp.iteration() as it:
                state = self.rdp.state_dict()
                if what == "nested":
                    with pytest.raises(RuntimeError, match="do not nest"), self.rdp.iteration():
                        raise AssertionError
                elif what == "load":
                    with pytest.raises(RuntimeError, match="within an iteration"):
                        self.rdp.load_state_dict(state)
                else:
                    with pytest.raises(RuntimeError, match="within an iteration"):
                        self.rdp.detach()
                assert self.rdp.state_dict() == state
                flags = {n for n, p in self.model.named_parameters() if p.requires_grad}
                assert flags == it.trainable
                raise Interruption
        assert same_bits(self.snapshot(), before)

    # Outside iterations.

    @precondition(lambda self: not self.attached)
    @rule(digit=digits, step=st.booleans())
    def a_plain_update(self, digit, step):
        DONE["plain updates"] += 1
        before = self.snapshot()
        self.plain.load_state_dict(self.model.state_dict())
        self.optimizer.zero_grad()
        gradients = []
        for name, module in drop_paths_of(self.plain).items():
            module.drop_prob = self.books.rates[name]
        for model in (self.model, self.plain):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(self.books.flags[name])
            torch.manual_seed(digit)
            self.train(model, digit)
            gradients.append({n: p.grad for n, p in model.named_parameters()})
        assert same_bits(*gradients)
        assert same_bits(buffers_of(self.model), buffers_of(self.plain))
        self.plain.requires_grad_(True).zero_grad()
        if step:
            self.step()
        self.check_kept(before, self.books.free(), (), step)

    @rule(
        block=st.sampled_from(["", *BLOCKS]),
        others=st.booleans(),
        single=st.sets(st.integers(0, 60), max_size=5),
    )
    def the_user_freezes_and_unfreezes(self, block, others, single):
        """A block (or everything) is set one way, the rest the other, and a few the other way."""
        DONE["flags changed by the user"] += 1
        for i, name in enumerate(self.books.flags):
            self.books.flags[name] = (name.startswith(block) ^ others) ^ (i in single)
        if not self.books.free():
            self.books.flags[name] = True
        self.restore_flags()

    def restore_flags(self):
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.books.flags[name])

    @rule(index=st.integers(0, 20), rate=st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    def a_rate_is_changed(self, index, rate):
        DONE["rates changed"] += 1
        names = [*self.books.rates]
        self.books.rates[names[index % len(names)]] = rate
        if not any(self.books.rates.values()):
            self.books.rates[names[0]] = 0.5
        for name, module in drop_paths_of(self.model).items():
            module.drop_prob = self.books.rates[name]

    # Copies, controllers, attach.

    def take_over(self, model):
        """Go on with a copy of the model, as a new process would."""
        optimizer = OPTIMIZERS[self.kind](model.parameters())
        optimizer.load_state_dict(self.optimizer.state_dict())
        self.model, self.optimizer = model, optimizer

    def new_controller(self, state):
        """A controller that starts elsewhere, and is told where the sequence stands."""
        self.rdp = ResidualDropPath(self.model, seed=self.books.seed + 1, every=3)
        self.rdp.load_state_dict(json.loads(json.dumps(state)))
        if self.attached:
            self.rdp.attach(self.optimizer)

    @rule(how=st.sampled_from(COPIES), go_on=st.booleans())
    def the_model_is_copied(self, how, go_on):
        DONE[how] += 1
        if how == "deepcopy":
            twin = copy.deepcopy(self.model)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(self.model))
        else:
            file = io.BytesIO()
            torch.save(self.model, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        assert same_bits(dict(twin.state_dict()), dict(self.model.state_dict()))
        assert {n: p.requires_grad for n, p in twin.named_parameters()} == self.books.flags
        self.check_as_plain(twin)
        before, state = self.snapshot(), self.rdp.state_dict()
        twin.requires_grad_(True)
        self.train(twin)  # in train mode and with gradients, which is no iteration of ours
        torch.optim.SGD(twin.parameters(), lr=1.0).step()
        assert same_bits(self.snapshot(), before)
        assert self.rdp.state_dict() == state
        if go_on:
            DONE["training goes on with a copy"] += 1
            if self.attached:  # the copies of its hooks, which do nothing
                for module in twin.modules():
                    module._forward_pre_hooks.clear()
            twin.load_state_dict(before["parameters"] | before["buffers"])
            twin.zero_grad()
            self.take_over(twin)
            self.restore_flags()
            self.new_controller(state)

    @rule(carry=st.booleans())
    def detached_and_patched_again(self, carry):
        DONE["detach()"] += 1
        state = self.rdp.state_dict()
        assert self.rdp.detach() is self.model
        assert self.rdp.detach() is self.model
        for module in drop_paths_of(self.model).values():
            assert type(module) is DropPath
            assert vars(module).keys() == vars(DropPath()).keys()
        attached, self.attached = self.attached, False
        self.outside_iterations_the_model_is_the_plain_one()
        with pytest.raises(RuntimeError, match="was detached"):
            self.rdp.iteration()
        if carry:
            self.attached = attached
            self.new_controller(state)
        else:
            flags, rates = self.books.flags, self.books.rates
            self.books = Books(self.model, self.books.seed, self.books.every)
            self.books.flags, self.books.rates = flags, rates
            self.rdp = ResidualDropPath(self.model, self.books.seed, self.books.every)

    @rule()
    def the_state_goes_into_a_fresh_controller(self):
        DONE["state_dict() and load_state_dict()"] += 1
        state = self.rdp.state_dict()
        self.rdp.detach()
        self.new_controller(state)
        assert self.rdp.state_dict() == state

    @precondition(lambda self: not self.attached)
    @rule()
    def attach(self):
        DONE["attach()"] += 1
        assert self.rdp.attach(self.optimizer) is self.rdp
        self.attached = True
        with pytest.raises(ValueError, match="already attached"):
            self.rdp.attach(self.optimizer)

    @rule(
        digit=digits,
        micro=st.sampled_from([1, 1, 2]),
        to_none=st.booleans(),
        meanwhile=st.sampled_from(["", "", "wander", "skip the batch", "detach"]),
    )
    def an_attached_update(self, digit, micro, to_none, meanwhile):
        if not self.attached:
            self.attach()
        phase, _, dropped, trainable = self.books.ask()
        DONE[f"attached {phase} iterations"] += 1
        self.books.begin()
        before = self.snapshot()
        self.train(digit=digit, count=micro)
        assert {n for n, p in self.model.named_parameters() if p.requires_grad} == trainable
        if meanwhile == "wander":
            self.wander()
        elif meanwhile == "skip the batch":
            DONE["attached batches skipped"] += 1
            self.optimizer.zero_grad()
            self.train(digit=digit + 1)
        if meanwhile == "detach":
            DONE["detached within an attached iteration"] += 1
            state = self.rdp.state_dict()
            assert self.rdp.detach() is self.model
            self.attached = False
            self.new_controller(state)
        else:
            self.step(to_none)
            self.books.complete()
        at_rest = self.books.dropped_part(dropped) if phase == "droppath" else ()
        self.check_kept(before, trainable, at_rest, stepped=meanwhile != "detach")


def drive(name, examples, steps, phases=(Phase.generate,)):
    machine = type(f"Machine_{name}", (Machine,), {"name": name})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            phases=phases,
            database=None,
            suppress_health_check=[*HealthCheck],
        ),
    )


def test_the_rules_hold_after_any_sequence_of_calls():
    drive("test_vit", examples=13, steps=12)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_rules_hold_after_many_long_sequences_of_calls(name):
    drive(name, examples=30, steps=30, phases=(Phase.generate, Phase.shrink))


def test_the_sequences_called_everything():
    if not DONE:
        pytest.skip("the tests above were not run")
    for what, count in sorted(DONE.items()):
        print(f"{count:6d} {what}")  # shown where the test fails
    assert all(DONE[f"{kind}{p} iterations"] for kind in ("", "attached ") for p in PHASES)
    for group in (INTERRUPTED, REFUSED, COPIES):
        assert sum(DONE[what] > 0 for what in group) > 1

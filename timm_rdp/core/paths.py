"""A model's paths and what each one carries: its autograd graph, condensed to bits."""

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from timm_rdp.core.drop_path import Kind

T = TypeVar("T")


@dataclass(frozen=True)
class Path:
    """One call of a DropPath during a training forward.

    Attributes:
        name: the module's name, plus `#k` in call order where it is called more than once.
        parameters: names of the parameters that no longer reach the output without this path.
        module: the DropPath.
        call: which call of the module within one forward, from 0.
        residual: whether the output stays connected to each input that it depends on without this
            path.
        kind: the module's class, and how its attributes are read.
        entrances: names of the modules that are handed one sample where the path is dropped; empty
            where a dropped path has to be computed and cut.
    """

    name: str
    parameters: tuple[str, ...]
    module: nn.Module = field(repr=False)
    call: int = field(repr=False)
    residual: bool = field(repr=False)
    kind: Kind = field(repr=False)
    entrances: tuple[str, ...] = field(default=(), repr=False)

    @property
    def drop_prob(self) -> float:
        """Probability with which the path is dropped, as its module has it now."""
        return float(getattr(self.module, self.kind.rate))


@dataclass(eq=False)
class Owner:
    """A module that owns parameters or buffers, as the traced forward called it."""

    name: str
    buffered: bool
    calls: int = 0
    behind_input: int = 0  # bits, see PathGraph


class PathGraph:
    """A model's autograd graph, condensed to one set of bits per path.

    Bit i < P stands for path i; then come the parameters, the modules that own parameters or
    buffers, and the input's tensors. `reached[i]` has the bits of everything that the backward pass
    meets behind path i before it meets another path; `reached[-1]` is the same for the output.

    Args:
        model: the model that the modules and names of the paths belong to.
        drop_paths: the DropPaths by name, called or not.
        called: name of the DropPath per path, in call order.
        parameters: names of the model's parameters.
        owners: the modules that own parameters or buffers.
        reached: P + 1 integers, see above.
    """

    def __init__(
        self,
        model: nn.Module,
        drop_paths: Mapping[str, Kind],
        called: list[str],
        parameters: list[str],
        owners: list[Owner],
        reached: list[int],
    ):
        self.drop_paths = drop_paths
        self._reached = reached
        self._count = len(called)
        self._path_bits = (1 << self._count) - 1
        self._parameters = parameters
        self._owners = owners
        self._buffered = sum(1 << i for i, o in enumerate(owners) if o.buffered)
        self._everything = self._live(0)
        self._last_cut: dict[int, int] = {}
        self._last_part: tuple[int, frozenset[str]] = 0, frozenset()
        inputs_from = self._count + len(parameters) + len(owners)
        inputs = self._everything >> inputs_from
        self.depends_on_input = bool(inputs)
        self.calls_per_forward = Counter(called)

        paths = []
        for i, name in enumerate(called):
            call = called[:i].count(name)
            paths.append(
                Path(
                    name=f"{name}#{call}" if self.calls_per_forward[name] > 1 else name,
                    parameters=tuple(_select(parameters, self._cut(1 << i))),
                    module=model.get_submodule(name),
                    kind=drop_paths[name],
                    call=call,
                    residual=self._live(1 << i) >> inputs_from == inputs,
                )
            )
        self.paths: tuple[Path, ...] = tuple(paths)
        self._index = {path.name: i for i, path in enumerate(paths)}

    def dropped_part(self, names: Iterable[str]) -> frozenset[str]:
        """Names of the parameters that reach the output, but not without the paths `names`.

        Raises:
            ValueError: a name is not that of a path; so for the methods below.
        """
        cut = self._cut(self._bits(names))
        if cut != self._last_part[0]:
            self._last_part = cut, frozenset(_select(self._parameters, cut))
        return self._last_part[1]

    def reached_parameters(self, names: Iterable[str]) -> frozenset[str]:
        """Names of the parameters that the output reaches when the paths `names` are cut."""
        return frozenset(_select(self._parameters, self._live(self._bits(names)) >> self._count))

    def dropped_buffers(self, names: Iterable[str]) -> frozenset[str]:
        """Names of the modules with buffers that reach the output only through `names`."""
        cut = self._cut(self._bits(names)) >> len(self._parameters)
        return frozenset(o.name for o in _select(self._owners, cut & self._buffered))

    def entrances(self, name: str) -> tuple[str, ...]:
        """Names of the modules at which a path begins.

        They are those on the path that own parameters, and whose input depends on no parameter that
        the path carries.
        """
        bit = self._bits([name])
        carried = self._cut(bit) & ((1 << len(self._parameters)) - 1)
        found = []
        for owner in _select(self._owners, self._cut(bit) >> len(self._parameters)):
            behind = self._closure(owner.behind_input, seen=0) >> self._count
            if owner.calls == 1 and not behind & carried:
                found.append(owner.name)
        return tuple(found)

    def _bits(self, names: Iterable[str]) -> int:
        bits = 0
        for name in names:
            if name not in self._index:
                near = difflib.get_close_matches(name, self._index, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "see ResidualDropPath.paths"
                raise ValueError(f"no path is named {name!r}: {hint}")
            bits |= 1 << self._index[name]
        return bits

    def _live(self, dropped: int) -> int:
        """Bits of everything that the output reaches when the paths `dropped` are cut."""
        return self._closure(self._reached[-1], seen=dropped)

    def _closure(self, live: int, seen: int) -> int:
        while todo := live & self._path_bits & ~seen:
            bit = todo & -todo
            seen |= bit
            live |= self._reached[bit.bit_length() - 1]
        return live

    def _cut(self, dropped: int) -> int:
        """Bits, from that of the first parameter on, of what the output no longer reaches."""
        if dropped not in self._last_cut:  # a cycle asks for the same one again and again
            self._last_cut = {dropped: (self._everything & ~self._live(dropped)) >> self._count}
        return self._last_cut[dropped]


def _select(items: list[T], bits: int) -> Iterator[T]:
    bits &= (1 << len(items)) - 1
    while bits:
        bit = bits & -bits
        bits ^= bit
        yield items[bit.bit_length() - 1]

"""Which output of a graph is fed back as which input: by name, type, shape and flow, never by order."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, permutations, product

from training.foreign.graph import CARRIED, MIXED, Flow

BEFORE = re.compile(
    r"^(?:in|out|input|output|new|next|prev|previous|old|init|initial|final|last|past|present|cur|y)[_.-]"
)
AFTER = re.compile(
    r"[_.-]?(?:in|out|input|output|new|next|prev|previous|old|init|initial|final|last|past|present|cur|(?<=[a-z_])[0n])$"
)
STATE = re.compile(r"(?:^|[^a-z])(?:h|c|hx|cx|state|states|hidden|cell|cache|mem|memory|carry)(?:[^a-z]|$)")
MAX_WAYS = 24
NAMED = 4.0
"""what two names that have nothing in common cost, beside the flow's cost"""


@dataclass(frozen=True)
class Tensor:
    """An input or output as the graph declares it: sizes, names of sizes, or None where it says nothing."""

    name: str
    dtype: str
    dims: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Pair:
    """A state: the input that it is fed to, the output that it comes from, and why it is believed."""

    input: str
    output: str
    why: str


@dataclass(frozen=True)
class _Candidate:
    input: str
    output: str
    shared: str
    """the part of both names that says what they are"""
    flow: float

    @property
    def cost(self) -> float:
        return self.flow + NAMED * (2.0 if not self.shared else 1.0 / (1 + len(self.shared)))

    @property
    def carried(self) -> bool:
        """Whether a recurrent operator carries it."""
        return CARRIED <= self.flow < 0.9

    @property
    def why(self) -> str:
        reasons = ["names"] if self.shared else []
        if self.carried:
            reasons.append("carried by a recurrent operator")
        elif self.flow < MIXED:
            reasons.append("flow")
        return " and ".join(reasons) or "its shape"


def ways(inputs: Sequence[Tensor], outputs: Sequence[Tensor], flow: Flow) -> list[tuple[float, list[Pair]]]:
    """Sets of state pairs that may be meant, with their cost, the most likely first; no pairs: no sign of a state."""
    candidates: dict[str, Sequence[_Candidate]] = {one.name: _candidates(one, outputs, flow) for one in inputs}
    chosen = {name: found for name, found in candidates.items() if found and _is_state(name, found)}
    chosen = chosen or _by_flow(inputs, candidates)
    if not chosen:
        return [(0.0, [])]
    costed = sorted(((_cost(way), way) for way in _assignments(chosen)), key=lambda way: way[0])[:MAX_WAYS]
    return [(cost, [Pair(one.input, one.output, one.why) for one in way]) for cost, way in costed]


def _cost(way: Sequence[_Candidate]) -> float:
    return sum(one.cost for one in way)


def _by_flow(
    inputs: Sequence[Tensor], candidates: Mapping[str, Sequence[_Candidate]]
) -> dict[str, Sequence[_Candidate]]:
    """States that no name and no operator shows: kept by arithmetic without a product, and others of their shape."""
    dims = {one.name: (one.dtype, one.dims) for one in inputs}
    kept = [name for name, found in candidates.items() if any(CARRIED < one.flow < MIXED for one in found)]
    alike = [name for name, found in candidates.items() if found and dims[name] in [dims[one] for one in kept]]
    chosen = next((names for names in (alike, kept) if len(names) < len(inputs)), [])  # something must be fed
    return {name: candidates[name] for name in chosen}


def _candidates(one: Tensor, outputs: Sequence[Tensor], flow: Flow) -> list[_Candidate]:
    reached = flow.costs(one.name)
    return [
        _Candidate(one.name, other.name, shared_stem(one.name, other.name), reached[other.name])
        for other in outputs
        if other.name in reached and other.dtype == one.dtype and _may_be_alike(one.dims, other.dims)
    ]


def _may_be_alike(a: Sequence[int | str | None], b: Sequence[int | str | None]) -> bool:
    same = all(x == y for x, y in zip(a, b, strict=False) if isinstance(x, int) and isinstance(y, int))
    return (len(a) == len(b) or not b) and same  # an output may say nothing of its axes


def _is_state(name: str, found: Sequence[_Candidate]) -> bool:
    """Whether an input is fed back: a recurrent operator carries it, or an output has its name."""
    return any(one.carried or one.shared for one in found) or bool(STATE.search(name.lower()))


def _assignments(chosen: Mapping[str, Sequence[_Candidate]]) -> Iterator[list[_Candidate]]:
    """Ways to give each input an output of its own; what fits one input alone is not tried elsewhere."""
    groups = _groups(chosen)
    parts = [list(islice(_ways_of(group), MAX_WAYS)) for group in groups]
    for way in islice(product(*parts), MAX_WAYS * MAX_WAYS):
        yield [one for part in way for one in part]


def _groups(chosen: Mapping[str, Sequence[_Candidate]]) -> list[dict[str, Sequence[_Candidate]]]:
    """Inputs that could have each other's outputs, together."""
    groups: list[tuple[set[str], dict[str, Sequence[_Candidate]]]] = []
    for name, found in chosen.items():
        outputs, members = {one.output for one in found}, {name: found}
        apart = []
        for other_outputs, other in groups:
            if other_outputs & outputs:
                outputs |= other_outputs
                members = {**other, **members}
            else:
                apart.append((other_outputs, other))
        groups = [*apart, (outputs, members)]
    return [members for _, members in groups]


def _ways_of(group: Mapping[str, Sequence[_Candidate]]) -> Iterator[list[_Candidate]]:
    """All ways within a group, the cheapest choice of each first."""
    if len(group) <= 6:
        names = list(group)
        outputs = sorted({one.output for found in group.values() for one in found})
        by_pair = {(one.input, one.output): one for found in group.values() for one in found}
        spare = [""] * (len(names) - len(outputs))
        found = []
        for chosen in set(permutations([*outputs, *spare], len(names))):
            pairs = [pair for pair in zip(names, chosen, strict=True) if pair[1]]
            if all(pair in by_pair for pair in pairs):
                found.append([by_pair[pair] for pair in pairs])
        yield from sorted(found, key=_cost)[:MAX_WAYS]
        return
    taken: set[str] = set()
    way: list[_Candidate] = []
    for one in sorted((one for found in group.values() for one in found), key=lambda one: one.cost):
        if one.output not in taken and all(one.input != other.input for other in way):
            way.append(one)
            taken.add(one.output)
    yield way


def shared_stem(a: str, b: str) -> str:
    """The longest thing that both names say once what marks them as before and after is taken off; "" if nothing."""
    return max(_stems(a) & _stems(b), key=len, default="")


def _stems(name: str) -> set[str]:
    """A name, and what is left of it without the marks of before and after."""
    plain = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    found, waiting = set(), [plain]
    while waiting:
        one = waiting.pop()
        if one in found or not one:
            continue
        found.add(one)
        waiting += [BEFORE.sub("", one), AFTER.sub("", one)]
    return found - {"", "y", "x", "in", "out", "input", "output"}

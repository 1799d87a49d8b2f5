"""Control flow of machine code: which instructions can be reached, and which of them are loops.

Made for the code that Triton's compilers write: every jump names its label, functions are
inlined, loops have one header (Aho, Lam, Sethi, Ullman, Compilers, 2006, section 9.6: natural
loops; dominators by Cooper, Harvey, Kennedy, A Simple, Fast Dominance Algorithm, 2001).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# A loop without any of these does no work: it waits, if it has a barrier or an atomic in it.
WORK = frozenset(
    "matrix mufu fp32 fp64 global_load global_store global_async shared_load shared_store shuffle "
    "spill_load spill_store".split()
)


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: bytes from the start of the function, or in assembly text the ordinal.
        opcode: with all suffixes, "HMMA.16816.F32.BF16".
        kind: one of result.KINDS.
        width: bytes that one lane moves; 0 where none, or where it is a bulk copy.
        flops: floating point operations of a matrix instruction that one warp issues.
        line: file and line of the kernel or of a helper of its author, if known.
        text: as the disassembler wrote it.
    """

    address: int
    opcode: str
    kind: str
    width: int = 0
    flops: int = 0
    line: tuple[str, int] | None = None
    text: str = ""


@dataclass(frozen=True)
class Step:
    """An instruction, the labels it may jump to, and whether the next one may follow it."""

    instruction: Instruction
    targets: tuple[str, ...] = ()
    falls: bool = True


@dataclass(frozen=True)
class Loop:
    """A natural loop.

    Attributes:
        instructions: indices of the body, without those of loops in it that only wait.
        depth: 1 for a loop in no other.
    """

    instructions: tuple[int, ...]
    depth: int


def control_flow(
    steps: Sequence[Step], labels: dict[str, int], entries: Iterable[int] = (0,)
) -> tuple[tuple[Instruction, ...], tuple[Loop, ...]]:
    """The instructions that can be reached, and the loops among them that do some work.

    What cannot be reached is the trap and the NOPs behind the last exit: they fill a cache line.

    Args:
        steps: the code in order of its addresses.
        labels: the index of the step that each label stands before.
        entries: the first step of each function.
    """
    starts, blocks = _blocks(steps, labels, entries)
    if not blocks:
        return (), ()
    index = {start: b for b, start in enumerate(starts)}
    successors: list[list[int]] = []
    for block in blocks:
        last = steps[block[-1]]
        follows = [labels[t] for t in last.targets if t in labels]
        follows += [block[-1] + 1] if last.falls else []
        successors.append([index[s] for s in dict.fromkeys(follows) if s in index])
    heads = [index[e] for e in entries if e in index]
    order = _reverse_postorder(successors, heads)
    found = _natural_loops(successors, order, heads)

    reached = sorted(order)
    kept = [i for b in reached for i in blocks[b]]
    place = {i: n for n, i in enumerate(kept)}
    waits = [body for body in found if _waits(steps[i] for b in body for i in blocks[b])]
    works = [body for body in found if body not in waits]
    loops = []
    for body in works:
        idle = set().union(*(w for w in waits if w < body))
        idle |= _detour(idle, blocks, steps, successors, body)
        depth = sum(body <= other for other in works)
        indices = (place[i] for b in body - idle for i in blocks[b])
        loops.append(Loop(tuple(sorted(indices)), depth))
    loops.sort(key=lambda loop: loop.instructions)
    return tuple(steps[i].instruction for i in kept), tuple(loops)


def _blocks(
    steps: Sequence[Step], labels: dict[str, int], entries: Iterable[int]
) -> tuple[list[int], list[range]]:
    leaders = {*entries, *labels.values()}
    leaders |= {i + 1 for i, step in enumerate(steps) if step.targets or not step.falls}
    starts = sorted(i for i in leaders if i < len(steps))
    ends = [*starts[1:], len(steps)]
    return starts, [range(a, b) for a, b in zip(starts, ends, strict=False)]


def _reverse_postorder(successors: list[list[int]], entries: Iterable[int]) -> list[int]:
    order: list[int] = []
    seen: set[int] = set()
    for entry in entries:
        stack = [] if entry in seen else [(entry, iter(successors[entry]))]
        seen.add(entry)
        while stack:
            node, following = stack[-1]
            new = next((s for s in following if s not in seen), None)
            if new is None:
                order.append(node)
                stack.pop()
            else:
                seen.add(new)
                stack.append((new, iter(successors[new])))
    return order[::-1]


def _natural_loops(
    successors: list[list[int]], order: list[int], entries: Iterable[int]
) -> list[set[int]]:
    """Blocks of each loop: header and all that reaches a jump back to it without passing it."""
    root = -1  # stands before every entry
    rank = {root: -1} | {b: n for n, b in enumerate(order)}
    before: dict[int, list[int]] = {b: [] for b in order}
    for entry in entries:
        before[entry].append(root)
    for b in order:
        for s in successors[b]:
            before[s].append(b)
    dominator = {root: root}
    changed = True
    while changed:
        changed = False
        for b in order:
            known = [p for p in before[b] if p in dominator]
            new = known[0]
            for p in known[1:]:
                while new != p:
                    if rank[new] > rank[p]:
                        new = dominator[new]
                    else:
                        p = dominator[p]
            changed |= dominator.get(b) != new
            dominator[b] = new

    def dominates(a: int, b: int) -> bool:
        while rank[b] > rank[a]:
            b = dominator[b]
        return a == b

    bodies: dict[int, set[int]] = {}
    for b in order:
        for header in successors[b]:
            if dominates(header, b):
                body = bodies.setdefault(header, {header})
                stack = [b]
                while stack:
                    node = stack.pop()
                    if node not in body:
                        body.add(node)
                        stack += before[node]
    return list(bodies.values())


def _waits(body: Iterable[Step]) -> bool:
    kinds = {step.instruction.kind for step in body}
    return not kinds & WORK and not kinds.isdisjoint(("barrier", "atomic"))


def _detour(
    idle: set[int],
    blocks: list[range],
    steps: Sequence[Step],
    successors: list[list[int]],
    body: set[int],
) -> set[int]:
    """Blocks that only lead to or from waits that stand out of line."""
    found = set()
    for b in body - idle:
        first = blocks[b][0]
        before = {p for p in body if b in successors[p]}
        only_jump = len(blocks[b]) == 1 and steps[first].targets
        aside = first and not steps[first - 1].falls
        if (before <= idle and only_jump) or (aside and {*successors[b]} <= idle):
            found.add(b)
    return found

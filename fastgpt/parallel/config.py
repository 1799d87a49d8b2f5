"""How the ranks of a run share its work."""

from dataclasses import dataclass, replace

SIZES = ("dp", "fsdp", "cp", "tp")  # outermost first: the ranks of tp are neighbours


@dataclass(frozen=True)
class ParallelConfig:
    """How many ranks share what; dp x fsdp x cp x tp is the number of ranks.

    Attributes:
        dp: groups of ranks, each with all weights and its own rows of the batch; -1 for as many as
            the ranks that are left allow.
        fsdp: ranks that keep a part of weights, gradients and moments each, and have their own rows
            of the batch (FSDP2).
        cp: ranks that share the positions of a row (context parallelism).
        tp: ranks that share heads, feed-forward columns and vocabulary (tensor parallelism).
        sequence: whether the ranks of tp share the positions between those products too; they then
            hold a part of all activations, for the same traffic.
        reshard: whether weights that fsdp gathers for the forward pass are given back before the
            backward pass, and gathered again: less memory for half as much traffic again.
        timeout: seconds that a rank waits for the others before the job ends.
    """

    dp: int = -1
    fsdp: int = 1
    cp: int = 1
    tp: int = 1
    sequence: bool = True
    reshard: bool = True
    timeout: float = 600.0

    def __post_init__(self) -> None:
        for name in SIZES:
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"ParallelConfig: {name} must be an int; got {size!r}")
            if size < 1 and size != -1:
                raise ValueError(
                    f"ParallelConfig: {name} must be at least 1, or -1 for what is left; got {size}"
                )
        if sum(getattr(self, name) == -1 for name in SIZES) > 1:
            raise ValueError(
                f"ParallelConfig: one size at most may be -1, what is left; got {self.sizes()}"
            )
        if not self.timeout > 0.0:
            raise ValueError(f"ParallelConfig: timeout must be above 0; got {self.timeout}")

    def sizes(self) -> str:
        """As "dp 2, fsdp 1, cp 1, tp 4"."""
        return ", ".join(f"{name} {getattr(self, name)}" for name in SIZES)

    def resolved(self, world: int) -> "ParallelConfig":
        """The same for so many ranks, -1 replaced.

        Raises:
            ValueError: the sizes do not multiply to world.
        """
        given = 1
        for name in SIZES:
            given *= max(1, getattr(self, name))
        left = next((name for name in SIZES if getattr(self, name) == -1), None)
        if world % given or (left is None and given != world):
            raise ValueError(
                f"parallel: dp x fsdp x cp x tp must be the number of ranks, {world};"
                f" got {self.sizes()}"
            )
        sizes = {name: getattr(self, name) for name in SIZES}
        if left is not None:
            sizes[left] = world // given
        return replace(self, dp=sizes["dp"], fsdp=sizes["fsdp"], cp=sizes["cp"], tp=sizes["tp"])

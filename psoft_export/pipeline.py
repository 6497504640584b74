"""Finding bases and using them: one target after another, in order, several at a time.

What takes a part of the machine runs beside others, a full SVD alone. Memory is bounded by the
largest targets, not by the model.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

import torch

from psoft_export.adapters.adapter import Adapter
from psoft_export.algebra.rounding import all_finite
from psoft_export.bases import BasisFinder, FoundBasis
from psoft_export.changes.change import WeightChange
from psoft_export.device import workers_on
from psoft_export.errors import CheckpointError, NonFiniteError, UsageError
from psoft_export.plan import PlannedTensor
from psoft_export.weights import TargetWeight

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S")
R = TypeVar("R")

_WAITING_BYTES = 16 * 2**20  # of other pieces that may wait behind a target


@dataclass(frozen=True)
class Progress:
    """How far a run is: bytes done, targets done, and the tensor at hand."""

    done_bytes: int
    total_bytes: int
    done_targets: int
    total_targets: int
    tensor: str


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True)
class Target:
    """A weight that the adapter changes, with its basis once that is found.

    `is_alone` says that no other target is worked on beside it.
    """

    tensor: PlannedTensor
    weight: TargetWeight
    basis: FoundBasis | None = None
    is_alone: bool = False

    def change(self, adapter: Adapter) -> WeightChange:
        """What an adapter does to it, once its basis is found."""
        assert self.basis is not None
        return adapter.change(self.module, self.basis.basis)

    @property
    def module(self) -> str:
        """Its module path."""
        assert self.tensor.module is not None
        return self.tensor.module

    @property
    def nbytes(self) -> int:
        """Size of the weight as the output has it."""
        return self.tensor.spec.nbytes

    def in_single_precision(self) -> "Target":
        """The same numbers in float32, as an SVD takes them."""
        return replace(self, weight=replace(self.weight, values=self.weight.values.float()))


class OtherPiece(Protocol):
    """What goes through a pipeline in its place in the order, untouched."""

    @property
    def nbytes(self) -> int:
        """Memory that it holds while it waits."""


OtherT = TypeVar("OtherT", bound=OtherPiece)


class TargetPipeline(Generic[T]):
    """Applies a function to every target once its basis is found."""

    def __init__(
        self, bases: BasisFinder, device: torch.device, use: Callable[[Target], T], largest: int
    ) -> None:
        """Prepare; nothing runs yet.

        Args:
            bases: finds the bases.
            device: where `use` computes; says how many targets run at a time.
            use: the function, called with `Target.basis` set, in one of several threads.
            largest: bytes of the largest target.
        """
        self._bases = bases
        self._device = device
        self._use = use
        self._largest = largest
        self._workers: _Workers | None = None

    def map(self, target: Target, work: Callable[[S], R], items: Sequence[S]) -> list[R]:
        """`work` of each item, in order: for `use`, which runs in one thread.

        Where the target is alone, the other threads take their part.
        """
        if target.is_alone and self._workers is not None:
            return self._workers.spread(work, items)
        return [work(item) for item in items]

    def run(self, pieces: Iterable[Target | OtherT]) -> Generator[tuple[Target | OtherT, T | None]]:
        """Yield each piece in its order, a target with the result of `use`, others with None.

        Pieces are read here and now, as many as may wait.

        Raises:
            NonFiniteError: a weight holds NaN or infinity.
            CheckpointError: the SVD of a weight does not converge.
            UsageError: too little memory on a GPU.
        """
        count = workers_on(self._device)
        with _Workers(count) as workers:
            self._workers = workers
            waiting: _Waiting[T, OtherT] = _Waiting((count + 1) * self._largest)
            for piece in pieces:
                if isinstance(piece, Target):
                    waiting.add(piece, workers.submit(self._used_at_once, piece))
                else:
                    waiting.add(piece, None)
                del piece
                while waiting.is_full:
                    yield from self._next(waiting, workers)
            while waiting:
                yield from self._next(waiting, workers)

    def _next(
        self, waiting: "_Waiting[T, OtherT]", workers: "_Workers"
    ) -> Iterator[tuple[Target | OtherT, T | None]]:
        """The first piece, unless it is a target whose basis is found only now.

        A full SVD has the machine to itself. What follows runs beside the reading of the next.
        """
        piece, future = waiting.next()
        if future is None:
            yield piece, None
            return
        assert isinstance(piece, Target)
        result = future.result()
        if result is None:
            piece = piece.in_single_precision()
            basis = workers.alone(self._basis_by_full_svd, piece)
            piece = replace(piece, basis=basis, is_alone=True)
            waiting.put_back(piece, workers.submit(self._used, piece))
            return
        waiting.is_narrow = piece.basis is not None
        yield piece, result

    def _used_at_once(self, target: Target) -> T | None:
        """The result for one target beside others; None where its basis takes the full SVD."""
        weight = target.weight
        with self._errors_named(target.tensor):
            if not all_finite(weight.values):
                raise damaged(target.tensor)
            basis = self._bases.find_beside_others(
                target.module, weight.as_trained, weight.trained.sha256
            )
        return None if basis is None else self._used(replace(target, basis=basis))

    def _basis_by_full_svd(self, target: Target) -> FoundBasis:
        """The basis of a target whose values are those of training (there is no record)."""
        weight = target.weight
        with self._errors_named(target.tensor):
            return self._bases.find_by_training_svd(
                target.module, weight.values, weight.trained.sha256
            )

    def _used(self, target: Target) -> T:
        with self._errors_named(target.tensor):
            return self._use(target)

    @contextmanager
    def _errors_named(self, tensor: PlannedTensor) -> Iterator[None]:
        """Errors of the computation, with the tensor they are about."""
        assert tensor.entry is not None
        try:
            yield
        except torch.linalg.LinAlgError as cause:
            raise CheckpointError(
                f"{tensor.entry.file}: the SVD of '{tensor.entry.name}' does not converge"
            ) from cause
        except torch.OutOfMemoryError as cause:
            raise UsageError(
                f"device {self._device}: too little GPU memory for '{tensor.entry.name}' "
                f"{list(tensor.entry.shape)}; use --device cpu"
            ) from cause


def damaged(tensor: PlannedTensor) -> NonFiniteError:
    """The error of a base tensor that is not finite."""
    assert tensor.entry is not None
    return NonFiniteError(
        f"{tensor.entry.file}: tensor '{tensor.entry.name}' holds NaN or infinity; the base is "
        "damaged"
    )


class _Workers(AbstractContextManager["_Workers"]):
    """Threads that divide torch's own among them.

    Each piece of work has the same number of torch's threads in every run, so that results do
    not depend on what else was running.
    """

    def __init__(self, count: int) -> None:
        """Start `count` threads."""
        self._count = count
        self._threads = torch.get_num_threads()
        self._share = self._threads // count
        self._pool = ThreadPoolExecutor(count, "psoft-worker")
        self._running: set[Future[Any]] = set()

    def __enter__(self) -> "_Workers":
        torch.set_num_threads(self._share)  # of this thread too, beside the others
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self._threads)

    def submit(self, work: Callable[P, T], *args: P.args, **named: P.kwargs) -> "Future[T]":
        """Start one piece of work."""
        future = self._pool.submit(self._in_share(work), *args, **named)
        self._running = {other for other in self._running if not other.done()} | {future}
        return future

    def spread(self, work: Callable[[S], R], items: Sequence[S]) -> list[R]:
        """`work` of each item, from a piece of work during which no long one is started."""
        if self._count == 1:  # this thread is the only one
            return [work(item) for item in items]
        others = [self._pool.submit(self._in_share(work), item) for item in items[1:]]
        return [*map(work, items[:1]), *(other.result() for other in others)]

    def alone(self, work: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Do one piece of work here with all of torch's threads, when all others are done."""
        wait(self._running)
        self._running.clear()  # with what they made
        torch.set_num_threads(self._threads)
        try:
            return work(*args, **named)
        finally:
            torch.set_num_threads(self._share)

    def _in_share(self, work: Callable[P, T]) -> Callable[P, T]:
        def run(*args: P.args, **named: P.kwargs) -> T:
            # Each time: what one thread sets for itself, MKL takes for all.
            torch.set_num_threads(self._share)
            return work(*args, **named)

        return run


class _Waiting(Generic[T, OtherT]):
    """Pieces on their way, in order; a bounded number of bytes.

    Small targets do not count as large ones, or a worker would have nothing to do beside one.

    Attributes:
        is_narrow: the last target took a full SVD, so the next will: no more than that one is
            read, while the last is worked on. Also the state at the start.
    """

    def __init__(self, target_bytes: int) -> None:
        """Take targets until they reach `target_bytes`, and few other bytes behind them."""
        self.is_narrow = True
        self._limit = target_bytes
        # A future's result is None where the basis takes the full SVD.
        self._pieces: deque[tuple[Target | OtherT, Future[T] | Future[T | None] | None]] = deque()

    def __bool__(self) -> bool:
        return bool(self._pieces)

    @property
    def is_full(self) -> bool:
        """Whether the first piece must go before another can be taken."""
        if not self._pieces:
            return False
        first, future = self._pieces[0]
        others = sum(piece.nbytes for piece, _ in self._pieces if not isinstance(piece, Target))
        if not isinstance(first, Target) or future is None or future.done():
            return True
        targets = [piece.nbytes for piece, _ in self._pieces if isinstance(piece, Target)]
        if self.is_narrow and (first.basis is None or len(targets) > 1):
            return True
        return others > _WAITING_BYTES or sum(targets) >= self._limit

    def add(self, piece: Target | OtherT, future: "Future[T | None] | None") -> None:
        """Take the next piece, with the work on it where there is some."""
        self._pieces.append((piece, future))

    def next(self) -> "tuple[Target | OtherT, Future[T] | Future[T | None] | None]":
        """Take the first piece out."""
        return self._pieces.popleft()

    def put_back(self, piece: Target, future: "Future[T]") -> None:
        """Put the first piece back, now that its basis is found and its work begun."""
        self.is_narrow = True
        self._pieces.appendleft((piece, future))

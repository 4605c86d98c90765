"""Runs sparse_mla's Gluon kernel in torch, a program at a time: Gluon has no interpreter.

A model of what one block of threads may assume. Shared memory reads as NaN until something is
there: an asynchronous copy arrives no sooner than it is waited for; a product reads its operands
when it is waited for, and has to find then what was there when it began; and what threads stored or
copied reaches a product only past a fence and a barrier. Layouts are ignored: the compiler checks
those. A wait for a product holds for one warpgroup: a barrier has to follow before its operands
are written.
"""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsa_kernels.launch import Launch

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int32": torch.int32,
    "int64": torch.int64,
    "float8e4nv": torch.float8_e4m3fn,
}


class Values:
    """A tensor of the kernel: `.to` as Triton has it, the rest is torch's."""

    def __init__(self, tensor: Any) -> None:
        self.tensor: Tensor = torch.as_tensor(unwrap(tensor))

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Values:
        return Values(self.tensor.view(dtype) if bitcast else self.tensor.to(dtype))

    def __getitem__(self, key: Any) -> Values:
        return Values(self.tensor[key])

    def __index__(self) -> int:
        return int(self.tensor)


def _lift(name: str) -> None:
    def operate(self: Values, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        return Values(getattr(self.tensor, name)(unwrap(other)))

    setattr(Values, name, operate)


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "radd", "rsub", "rmul", "rtruediv"):
    _lift(f"__{_name}__")
for _name in ("ge", "lt", "eq"):
    _lift(f"__{_name}__")


def unwrap(value: Any) -> Any:
    return value.tensor if isinstance(value, Values) else value


@dataclass(frozen=True)
class PointerType:
    element_ty: torch.dtype


@dataclass
class Pointer:
    """Byte offsets into a tensor's storage."""

    memory: Tensor
    dtype: PointerType
    offset: Tensor

    @classmethod
    def to_tensor(cls, tensor: Tensor) -> Pointer:
        memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        start = torch.tensor(tensor.storage_offset() * tensor.itemsize)
        return cls(memory, PointerType(tensor.dtype), start)

    def __add__(self, steps: Any) -> Pointer:
        size = self.dtype.element_ty.itemsize
        return Pointer(self.memory, self.dtype, self.offset + torch.as_tensor(unwrap(steps)) * size)

    def __getitem__(self, key: Any) -> Pointer:
        return Pointer(self.memory, self.dtype, self.offset[key])

    def to(self, dtype: PointerType) -> Pointer:
        return Pointer(self.memory, dtype, self.offset)

    def bytes_at(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Addresses [..., itemsize], and the mask in their shape."""
        size = self.dtype.element_ty.itemsize
        wanted = torch.as_tensor(True if mask is None else unwrap(mask))
        offset, wanted = torch.broadcast_tensors(self.offset, wanted)
        at = offset[..., None] + torch.arange(size)
        assert ((at >= 0) & (at < len(self.memory)))[wanted].all(), "out of bounds"
        return at, wanted


@dataclass
class Shared:
    """A view of shared memory.

    Attributes:
        data: what is there.
        unfenced: 2 where a product does not see it yet, 1 once there was a fence, 0 past a barrier.
        read: whether a product read it that other threads may not have waited for.
    """

    data: Tensor
    unfenced: Tensor
    read: Tensor

    def index(self, at: int) -> Shared:
        return Shared(self.data[at], self.unfenced[at], self.read[at])

    def slice(self, start: int, length: int, dim: int) -> Shared:
        return Shared(
            *(x.narrow(dim, start, length) for x in (self.data, self.unfenced, self.read))
        )

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(*(x.permute(order) for x in (self.data, self.unfenced, self.read)))

    def write(self, value: Tensor | float) -> None:
        assert not self.read.any(), "written before all threads have waited for a product"
        self.data.copy_(torch.as_tensor(value))
        self.unfenced.fill_(2)

    def store(self, value: Values) -> None:
        self.write(value.tensor)

    def load(self, _layout: Any) -> Values:
        return Values(self.data.clone())


@dataclass
class Product:
    """Products under way on one accumulator."""

    acc: Tensor
    operands: list[tuple[Any, Any, Tensor, Tensor]] = field(default_factory=list)


@dataclass
class Block:
    """One program: the `gl`, `async_copy` and Hopper functions that the kernel calls."""

    program: tuple[int, int]
    grid: tuple[int, ...]
    allocations: list[Shared] = field(default_factory=list)
    copies: list[tuple[Shared, Tensor]] = field(default_factory=list)
    committed: list[tuple[Shared, Tensor]] = field(default_factory=list)

    def allocate(self, dtype: Any, shape: Any, _layout: Any, value: Any = None) -> Shared:
        data = torch.full(tuple(shape), float("nan"), dtype=dtype)
        shared = Shared(
            data, torch.zeros_like(data, dtype=torch.int8), torch.zeros_like(data, dtype=torch.bool)
        )
        self.allocations.append(shared)
        if value is not None:
            shared.store(value)
        return shared

    def load(self, pointer: Pointer, mask: Any = None, other: Any = 0) -> Values:
        at, wanted = pointer.bytes_at(mask)
        raw = pointer.memory[torch.where(wanted[..., None], at, 0)]
        value = raw.contiguous().view(pointer.dtype.element_ty)[..., 0]
        return Values(torch.where(wanted, value, torch.tensor(other, dtype=value.dtype)))

    def store(self, pointer: Pointer, value: Values, mask: Any = None) -> None:
        at, wanted = pointer.bytes_at(mask)
        raw = value.tensor.to(pointer.dtype.element_ty).contiguous()[..., None].view(torch.uint8)
        pointer.memory[at[wanted]] = raw.expand(at.shape)[wanted]

    def copy(self, shared: Shared, pointer: Pointer, mask: Any = None) -> None:
        shared.write(float("nan"))
        self.copies.append((shared, self.load(pointer, mask).tensor))

    def commit(self) -> None:
        self.committed += self.copies
        self.copies = []

    def wait_copies(self, outstanding: int) -> None:
        assert outstanding == 0
        for shared, value in self.committed:
            shared.write(value)
        self.committed = []

    def fence(self) -> None:
        for shared in self.allocations:
            shared.unfenced[shared.unfenced == 2] = 1

    def barrier(self) -> None:
        for shared in self.allocations:
            shared.unfenced[shared.unfenced == 1] = 0
            shared.read.fill_(False)

    def product(
        self, a: Shared, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool
    ) -> Product:
        assert is_async
        unseen = a.unfenced.any() or b.unfenced.any()
        assert not unseen, "not yet visible to a product"
        found = acc if isinstance(acc, Product) else Product(unwrap(acc) * int(use_acc))
        found.operands.append((a, b, a.data.clone(), b.data.clone()))
        return found

    def wait_products(self, outstanding: int, products: list[Product]) -> Values:
        assert outstanding == 0
        (product,) = products
        for a, b, a_then, b_then in product.operands:
            same = a.data.equal(a_then) and b.data.equal(b_then)
            assert same, "changed under a product"
            product.acc = product.acc + a_then.float() @ b_then.float()
            a.read.fill_(True)
            b.read.fill_(True)
        return Values(product.acc)


def run(module: Any, launch: Launch) -> None:
    """As `launch.run()`, of the kernel `_attend` of a module."""
    rows, parts = launch.grid
    for row in range(rows):
        for part in range(parts):
            _functions(module, Block((row, part), launch.grid))["_attend"](
                **{
                    name: Pointer.to_tensor(value) if isinstance(value, Tensor) else value
                    for name, value in launch.arguments.items()
                }
            )


def _functions(module: Any, block: Block) -> dict[str, Any]:
    """The module's names with jitted functions as plain ones, and Gluon's as the block's."""
    names: dict[str, Any] = {
        "gl": _language(block),
        "async_copy": types.SimpleNamespace(
            commit_group=block.commit, wait_group=block.wait_copies
        ),
        "_async_load": block.copy,
        "_barrier": block.barrier,
        "fence_async_shared": block.fence,
        "warpgroup_mma": block.product,
        "warpgroup_mma_wait": block.wait_products,
    }
    own = {}
    for name, value in vars(module).items():
        if hasattr(value, "fn") and name not in names:
            own[name] = types.FunctionType(value.fn.__code__, names, name, value.fn.__defaults__)
        elif hasattr(value, "value") and name.startswith("_"):
            own[name] = value.value
    names |= own
    names["range"] = lambda *ends: range(*map(int, ends))
    return names


def _language(block: Block) -> Any:
    def layout(*_: Any) -> None:
        return None

    def full(shape: Any, value: float, dtype: Any, _layout: Any) -> Values:
        return Values(torch.full(tuple(shape), value, dtype=dtype))

    def of(function: Any) -> Any:
        return lambda *values: Values(function(*(torch.as_tensor(unwrap(v)) for v in values)))

    return types.SimpleNamespace(
        **DTYPES,
        constexpr=layout,
        BlockedLayout=layout,
        SliceLayout=layout,
        NVMMADistributedLayout=layout,
        NVMMASharedLayout=layout,
        SwizzledSharedLayout=layout,
        pointer_type=PointerType,
        static_range=range,
        program_id=lambda axis: Values(block.program[axis]),
        num_programs=lambda axis: Values(block.grid[axis]),
        allocate_shared_memory=block.allocate,
        load=block.load,
        store=block.store,
        arange=lambda start, end, _layout: Values(torch.arange(start, end, dtype=torch.int32)),
        full=full,
        zeros=lambda shape, dtype, layout: full(shape, 0, dtype, layout),
        convert_layout=lambda value, *_: value,
        where=of(torch.where),
        minimum=of(torch.minimum),
        maximum=of(torch.maximum),
        exp2=of(torch.exp2),
        log2=of(torch.log2),
        max=lambda value, axis: Values(value.tensor.amax(axis)),
        sum=lambda value, axis: Values(value.tensor.sum(axis)),
    )

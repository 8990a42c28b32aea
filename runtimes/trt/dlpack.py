"""DLPack without a library: arrays on a GPU from and to torch, JAX, CuPy and others (dmlc.github.io/dlpack).

The capsules are those of every version of DLPack ("dltensor"): producers give them where no newer ones are asked for.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import numpy as np

from rpfm_edge.core.errors import SignatureError

CPU, CUDA, CUDA_MANAGED = 1, 2, 13  # DLDeviceType
NEW, USED = b"dltensor", b"used_dltensor"
KINDS = {0: "i", 1: "u", 2: "f", 6: "b"}  # DLDataTypeCode → numpy's


class Tensor(ctypes.Structure):
    """DLTensor; shape and strides are in elements, and no strides mean contiguous."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class Managed(ctypes.Structure):
    """DLManagedTensor: its consumer calls ``deleter`` with its address, once."""

    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_alive: dict[int, tuple[Any, ...]] = {}  # address of a Managed → what it needs, until its deleter is called
_delete = _Deleter(lambda address: _alive.pop(address, None) and None)
_api = ctypes.pythonapi
_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(("PyCapsule_New", _api))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", _api))
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", _api))
_dying_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _api))
_dying_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _api))
_rename = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_SetName", _api))


def _forget(dying: int) -> None:
    """The destructor of a capsule: one that nobody used is given back here. No reference to it may be made any more."""
    if _dying_is_valid(dying, NEW):
        _alive.pop(_dying_pointer(dying, NEW), None)


_drop = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(_forget)


def capsule(pointer: int, shape: tuple[int, ...], dtype: str, device: tuple[int, int], owner: Any) -> Any:
    """A capsule of contiguous memory; ``owner`` lives as long as the capsule or whoever took its content."""
    kind, sizes = np.dtype(dtype), (ctypes.c_int64 * len(shape))(*shape)
    code = next(number for number, letter in KINDS.items() if letter == kind.kind)
    dims = ctypes.cast(sizes, ctypes.POINTER(ctypes.c_int64))
    tensor = Tensor(pointer, *device, len(shape), code, kind.itemsize * 8, 1, dims, None, 0)
    managed = Managed(tensor, None, ctypes.cast(_delete, ctypes.c_void_p))
    address = ctypes.addressof(managed)
    _alive[address] = (managed, sizes, owner)
    return _new(address, NEW, _drop)


class Adopted:
    """What a capsule holds, with ``__cuda_array_interface__``; given back to its producer when this goes away.

    Whoever made the capsule has seen to it that the stream that it was asked for may read.
    """

    def __init__(self, made: Any) -> None:
        if not _is_valid(made, NEW):
            raise SignatureError("a DLPack capsule was used before", expected="a new one", fix="feed the array itself")
        address = _pointer(made, NEW)
        _rename(made, USED)
        managed = Managed.from_address(address)
        if managed.deleter:
            weakref.finalize(self, _Deleter(managed.deleter), address).atexit = False
        tensor = managed.tensor
        if tensor.code not in KINDS or tensor.lanes != 1:
            raise SignatureError(
                f"a DLPack array of type {tensor.code} with {tensor.bits} bits and {tensor.lanes} lanes",
                expected="numbers that numpy knows",
                fix="convert it to the type of the input",
            )
        kind = np.dtype(f"{KINDS[tensor.code]}{tensor.bits // 8}")
        strides = tuple(step * kind.itemsize for step in tensor.strides[: tensor.ndim]) if tensor.strides else None
        self.__cuda_array_interface__ = {
            "data": ((tensor.data or 0) + tensor.byte_offset, False),
            "shape": tuple(tensor.shape[: tensor.ndim]),
            "typestr": kind.str,
            "strides": strides,
            "version": 3,
            "stream": None,
        }


def adopted(array: Any, stream: int) -> Any:
    """``array``, or what stands for it: an ``Adopted`` if it offers GPU memory by DLPack alone, numpy if CPU memory.

    Args:
        stream: the CUDA stream that will read it, for which its producer has what was started before made visible.
    """
    if isinstance(array, np.ndarray) or hasattr(array, "__cuda_array_interface__") or not hasattr(array, "__dlpack__"):
        return array
    kind, number = (int(value) for value in array.__dlpack_device__())
    if kind == CPU:
        return np.from_dlpack(array)
    if kind not in (CUDA, CUDA_MANAGED) or number:
        raise SignatureError(
            f"an array on DLPack device {kind}:{number}",
            expected="memory of the CPU or of the GPU that the engine runs on",
            fix="copy it there",
        )
    return Adopted(array.__dlpack__(stream=stream))

"""What a pickle of PyTorch may name: dtypes, and what is passed over. None of it is imported."""

import re

import ml_dtypes
import numpy as np

DTYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
    "storage.UntypedStorage": np.dtype("u1"),  # of the tensors that name their dtype
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    **{f"uint{bits}": np.dtype(f"<u{bits // 8}") for bits in (16, 32, 64)},
}

# What stands beside the weights in published checkpoints (callbacks, counters) and is passed over.
INERT_PACKAGES = ("pytorch_lightning", "lightning", "lightning_fabric", "omegaconf")
PLAIN = "dict list set int float str tuple complex slice range xrange frozenset bytearray".split()
INERT = {
    "argparse.Namespace",
    *("collections.Counter", "collections.deque", "decimal.Decimal", "uuid.UUID"),
    *(f"datetime.{t}" for t in ("date", "datetime", "time", "timedelta", "timezone")),
    *(f"pathlib.{t}" for t in ("Path", "PosixPath", "WindowsPath", "PurePosixPath")),
    *("torch.device", "torch.Generator", "torch.Tensor", "torch.serialization._get_layout"),
    *("torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"),
    *(f"torch.{t}" for t in ("float64", "float32", "float16", "bfloat16", "bool", "complex64")),
    *(f"torch.{t}" for t in ("int64", "int32", "int16", "int8", "uint8", "complex128")),
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "_codecs.encode",
    "typing.Any",
    *(f"{b}.{t}" for b in ("builtins", "__builtin__") for t in PLAIN),
}

# Tensors that are no plain array: sparse, quantised, without values, complex.
STRANGE = re.compile(r"torch\._(utils\._rebuild|tensor\.)\w+|torch\.(Complex|Q)\w+Storage")

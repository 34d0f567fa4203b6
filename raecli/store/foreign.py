"""What libraries raise on files of strangers: torn, locked, or claiming what cannot be. No torch."""

import lzma
import struct
import tokenize
import zipfile
import zlib
from pickle import UnpicklingError

from safetensors import SafetensorError

# zipfile and numpy on an .npz or .npy. RuntimeError: locked, or packed in a way that is not known.
ARRAYS = (
    ValueError, TypeError, KeyError, SyntaxError, OverflowError, OSError, EOFError, MemoryError, RuntimeError,
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, tokenize.TokenError,
)  # fmt: skip

# torch.load(weights_only=True), which interprets whatever bytes there are
PICKLES = (
    UnpicklingError, LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError, AssertionError,
    EOFError, OSError, MemoryError, struct.error, SafetensorError,  # a new torch reads those too, by their ending
)  # fmt: skip

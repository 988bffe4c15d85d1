"""Optional packages: imported where they are used, and their absence names the extra that brings them."""

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Imports an optional package.

    Args:
        module: Its import name, as in "onnxruntime.quantization".
        extra: The extra of this project that installs it.

    Raises:
        ImportError: It is not installed; with the command that mends it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"the package {module.split('.')[0]} is needed: pip install 'modeling-jina-bert[{extra}]'"
        ) from error

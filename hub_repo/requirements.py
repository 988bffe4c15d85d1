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
        raise ImportError(f"the package {module.split('.')[0]} is needed: {install_command(extra)}") from error


def install_command(extra: str) -> str:
    """Installs the packages of an extra.

    Example:
        >>> install_command("cli")
        'pip install -e ".[cli]" in a clone of the project'
    """
    return f'pip install -e ".[{extra}]" in a clone of the project'

"""Loads a folder as a stranger would: in a fresh process, offline, with trust_remote_code and without our package.

Law: it runs the code that lies in the folder. Callers ask for trust first, or have found the code to be our own.
"""

import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from transformers.utils import logging as transformers_logging

from ..requirements import install_command

CHECK_TEXTS = ("How is the weather today?", "", "A longer text, of many words. " * 300)
"""Short, empty and of more than 2,049 tokens, the longest sequence that other engines are compared at."""
_TIME_LIMIT = 900  # seconds; loading a folder takes 10 to 30
_SECRET = re.compile(r"(^|_)(TOKENS?|SECRETS?|PASSWORD|KEYS?|CREDENTIALS?)(_|$)", re.IGNORECASE)

# NOTE: a finder that refuses our package: whether it is installed must not decide whether the folder loads.
_PROGRAM = """
import sys
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_jina_bert":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NotInstalled())
import numpy as np
from transformers import AutoModel
folder, target, with_sentence_transformers, *texts = sys.argv[1:]
found = {"AutoModel": AutoModel.from_pretrained(folder, trust_remote_code=True).encode(texts)}
if with_sentence_transformers == "True":
    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
    found["SentenceTransformer"] = model.encode(texts, prompt="")
np.savez(target, **found)
"""


def quiet_transformers():
    """For entry points: no progress bars, and no table of the tensors that a class does not use."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def load_in_fresh_process(folder: Path, *, sentence_transformers: bool = True) -> dict[str, np.ndarray]:
    """Embeds `CHECK_TEXTS` with the folder's own code.

    Args:
        folder: A folder of our form. Its code is executed.
        sentence_transformers: Whether to load it as a `SentenceTransformer`, too.

    Returns:
        "AutoModel" and "SentenceTransformer" -> `(texts, hidden) float32`.

    Raises:
        RuntimeError: It does not load; the end of what the process said.
        ImportError: sentence-transformers is not installed here, which is no fault of the folder.
    """
    if sentence_transformers and find_spec("sentence_transformers") is None:
        raise ImportError(f"the package sentence_transformers is needed: {install_command('export')}")
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "vectors.npz"
        environment = _environment(Path(scratch))
        arguments = [str(folder.resolve()), str(target), str(sentence_transformers), *CHECK_TEXTS]
        try:
            process = subprocess.run(
                [sys.executable, "-c", _PROGRAM, *arguments],
                capture_output=True,
                text=True,
                cwd=scratch,
                env=environment,
                stdin=subprocess.DEVNULL,  # a question about trust is answered by an error, not waited for
                timeout=_TIME_LIMIT,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{folder} did not load in {_TIME_LIMIT} seconds.") from None
        if process.returncode:
            raise RuntimeError(f"{folder} does not load in a fresh process:\n{process.stderr[-2000:]}")
        with np.load(target) as found:
            return dict(found)


def _environment(scratch: Path) -> dict[str, str]:
    """The variables that the folder's code may see: no token of the Hub, and nothing else that is named like a secret.

    NOTE: a stranger's code still runs as the user and can read the user's files; what it is not given is the token
    that transformers and huggingface_hub would hand it unasked. Caches go to the scratch folder, so nothing stays.
    """
    visible = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not _SECRET.search(name)}
    home = str(scratch / "hub")
    return visible | {"HF_HUB_OFFLINE": "1", "HF_HOME": home, "HF_MODULES_CACHE": str(scratch / "modules")}


def smallest_cosine(vectors: np.ndarray, expected: np.ndarray) -> float:
    """Smallest cosine between rows; a row of zeros has cosine 1 with zeros and 0 with anything else.

    Args:
        vectors: `(texts, hidden)`.
        expected: The same shape.
    """
    if vectors.shape != expected.shape:
        return float("nan")
    vectors, expected = vectors.astype(np.float64), expected.astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1), np.linalg.norm(expected, axis=1)
    both_zero = (norms[0] == 0) & (norms[1] == 0)
    cosines = (vectors * expected).sum(axis=1) / np.maximum(norms[0] * norms[1], 1e-300)
    return float(np.where(both_zero, 1.0, cosines).min())

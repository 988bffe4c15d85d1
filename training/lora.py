"""LoRA adapters on JinaBERT: added, trained alone, saved beside the base they belong to, merged into a plain model.

Law: the adapted model and the merged one give the same embeddings; no weight of the base changes before it is merged.

The adapter folder names the folder of its base (`base_model_name_or_path`): it loads with trust_remote_code where that
folder, or Hub repository, is. The merged folder stands alone.
"""

from pathlib import Path

from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import PreTrainedModel

from .recipe import LoraRecipe, RecipeError

_ATTENTION = ["query", "key", "value", "attention.output.dense"]


def default_targets(qk_post_norm: bool) -> list[str]:
    """The linear layers of the encoder, by the names of its layout.

    Args:
        qk_post_norm: The layout of jina-bert-v2-qk-post-norm, or else that of jina-bert-implementation.
    """
    return [*_ATTENTION, *(["up_gated_layer", "down_layer"] if qk_post_norm else ["gated_layers", "wo"])]


def add_lora(model: SentenceTransformer, recipe: LoraRecipe):
    """Adds adapters to the model and freezes everything else; the embeddings stay what they were until it is trained.

    Raises:
        RecipeError: No package peft; a rank, dropout or target that cannot be.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise RecipeError('lora: peft is not installed; pip install -e ".[train]".') from error

    encoder = model.transformers_model
    targets = recipe.targets or default_targets(encoder.config.qk_post_norm)
    if recipe.r < 1:
        raise RecipeError(f"lora.r={recipe.r} is below 1.")
    if not 0 <= recipe.dropout < 1:
        raise RecipeError(f"lora.dropout={recipe.dropout} is not in [0, 1).")
    linear = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            names = ", ".join(default_targets(encoder.config.qk_post_norm))
            raise RecipeError(f"lora.targets: {target!r} is no linear layer of this model; it has {names}.")
    if Path(encoder.name_or_path).is_dir():  # what the adapter calls its base, from any working directory
        encoder.name_or_path = str(Path(encoder.name_or_path).resolve())
    model.add_adapter(
        LoraConfig(r=recipe.r, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, target_modules=targets)
    )


def merge_lora(model: SentenceTransformer):
    """Adds the adapters to the weights they stand beside and removes them: a plain model, which saves as one.

    Raises:
        ValueError: The model has no adapter.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    encoder: PreTrainedModel = model.transformers_model
    adapted = [(name, module) for name, module in encoder.named_modules() if isinstance(module, BaseTunerLayer)]
    if not adapted:
        raise ValueError("This model has no adapter to merge.")
    for name, module in adapted:
        module.merge(safe_merge=True)  # refuses weights that are not finite
        encoder.set_submodule(name, module.get_base_layer())
    encoder._hf_peft_config_loaded = False
    del encoder.peft_config
    encoder.requires_grad_(True)

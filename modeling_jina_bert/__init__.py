"""Open implementation of JinaBERT, the model of Jina Embeddings v2 (arXiv 2310.19923).

Importing this package registers the classes with transformers' Auto classes for `model_type: jina_bert`. The same
files, flat, are the remote code beside published weights.
"""

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .alibi import alibi_bias, alibi_hankel, alibi_slopes
from .chunking import Chunk, sentence_spans
from .configuration_jina_bert import JinaBertConfig
from .encoding import count_truncations, mean_pooling
from .modeling_jina_bert import (
    JinaBertForMaskedLM,
    JinaBertForMultipleChoice,
    JinaBertForQuestionAnswering,
    JinaBertForSequenceClassification,
    JinaBertForTokenClassification,
    JinaBertModel,
    JinaBertPreTrainedModel,
)
from .sparsity import count_scores

_AUTO_CLASSES: dict[Any, type[JinaBertPreTrainedModel]] = {
    AutoModel: JinaBertModel,
    AutoModelForMaskedLM: JinaBertForMaskedLM,
    AutoModelForSequenceClassification: JinaBertForSequenceClassification,
    AutoModelForTokenClassification: JinaBertForTokenClassification,
    AutoModelForQuestionAnswering: JinaBertForQuestionAnswering,
    AutoModelForMultipleChoice: JinaBertForMultipleChoice,
}

AutoConfig.register(JinaBertConfig.model_type, JinaBertConfig)
JinaBertConfig.register_for_auto_class()
for _auto_class, _model_class in _AUTO_CLASSES.items():
    _auto_class.register(JinaBertConfig, _model_class)
    # save_pretrained then writes the code beside the weights.
    _model_class.register_for_auto_class(_auto_class.__name__)

__version__ = "0.2.0"
__all__ = [
    "Chunk",
    "JinaBertConfig",
    "JinaBertForMaskedLM",
    "JinaBertForMultipleChoice",
    "JinaBertForQuestionAnswering",
    "JinaBertForSequenceClassification",
    "JinaBertForTokenClassification",
    "JinaBertModel",
    "JinaBertPreTrainedModel",
    "alibi_bias",
    "alibi_hankel",
    "alibi_slopes",
    "count_scores",
    "count_truncations",
    "mean_pooling",
    "sentence_spans",
]

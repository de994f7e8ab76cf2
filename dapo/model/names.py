"""One table of a model's tensors: names and shapes in Hugging Face's files, names in Megatron. No torch."""

from __future__ import annotations

from dataclasses import replace

from dapo.model.entries import Entry
from dapo.model.families import FAMILIES
from dapo.model.shape import ModelShape


def table(shape: ModelShape, is_fused: bool) -> list[Entry]:
    """Return the whole model's entries, layer by layer.

    `is_fused`: the linear after a norm holds it, as in Transformer Engine's layers and in every checkpoint.
    """
    vocab, norm = ((shape.vocab_size, shape.hidden_size),), ((shape.hidden_size,),)
    embedding, final_norm = ("model.embed_tokens.weight",), ("model.norm.weight",)
    entries = [Entry("embedding.word_embeddings.weight", embedding, vocab, "rows", stage="first")]
    for layer in range(shape.num_layers):
        of_layer = FAMILIES[shape.model_type].layer(shape, layer, is_fused)
        entries += of_layer if shape.are_layers_alike else [replace(e, is_stacked=False) for e in of_layer]
    entries.append(Entry("decoder.final_layernorm.weight", final_norm, norm, "whole", stage="last"))
    if not shape.is_tied:
        entries.append(Entry("output_layer.weight", ("lm_head.weight",), vocab, "rows", stage="last"))
    return entries

"""What Megatron imports of it; its fusions are not used."""


def fused_topk_with_score_function(*arguments: object, **options: object) -> None:
    raise NotImplementedError


fused_compute_score_for_moe_aux_loss = fused_moe_aux_loss = fused_topk_with_score_function

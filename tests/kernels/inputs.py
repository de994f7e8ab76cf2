"""Make random rows of a policy loss, and measure how far a result is from the truth."""

import torch
from dapo_kernels.reference import policy_loss

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
T, V = 41, 37  # odd on purpose


def random_inputs(seed=0, num_tokens=T, vocab=V, dtype=torch.float64, temperature=1.0):
    """Return logits, targets, old_logprobs, advantages and mask. Log-ratios are ~ N(0, 0.5): a good part lies
    beyond either clip bound.
    """
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_tokens, vocab, generator=g, dtype=torch.float64)
    targets = torch.randint(vocab, (num_tokens,), generator=g)
    mask = torch.rand(num_tokens, generator=g) < 0.7
    own = (logits / temperature).log_softmax(-1)[torch.arange(num_tokens), targets]
    old = own + 0.5 * torch.randn(num_tokens, generator=g, dtype=torch.float64)
    advantages = torch.randn(num_tokens, generator=g, dtype=torch.float64)
    return logits.to(dtype), targets, old.to(dtype), advantages.to(dtype), mask


def truth_of(inputs, **options):
    """Compute the reference in float64: (result, gradient of the logits)."""
    logits, *rest = (double(x) for x in inputs)
    logits = logits.clone().requires_grad_()
    result = policy_loss(logits, *rest, **CLIP, **{name: double(x) for name, x in options.items()})
    result.loss.backward()
    return result, logits.grad


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def relative_error(x, truth):
    """Compute ‖x − truth‖ / ‖truth‖; where the truth is 0, so must x be."""
    x, truth = x.detach().double(), truth.detach().double()
    difference, size = (x - truth).norm().item(), truth.norm().item()
    return difference / size if size else difference


def make(num_tokens=12, vocab=1000, dtype=torch.float32, seed=0, temperature=1.0):
    """Return `random_inputs` with logits of `dtype` and the rest float32."""
    logits, targets, old, advantages, mask = random_inputs(seed, num_tokens, vocab, temperature=temperature)
    return logits.to(dtype), targets, old.float(), advantages.float(), mask


def options_for(num_tokens, seed=8):
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(num_tokens, generator=g) * (torch.arange(num_tokens) % 5 > 0)
    ref = -10 - 3 * torch.rand(
        num_tokens, generator=g
    )  # near log-probs of random ids: no penalty drowns the rest
    third = num_tokens // 3
    sequences = torch.tensor([0, third, third, num_tokens])
    penalty = {"ref_logprobs": ref, "kl_coef": 0.05}
    return [
        {},
        {"weights": weights, "dual_clip": 1.3, "ref_logprobs": ref, "kl_coef": 0.05, "temperature": 0.8},
        {"dual_clip": 1.1},
        {"ref_logprobs": ref, "kl_coef": 0.3},
        {"temperature": 1.7},
        {"kind": "cispo", "weights": weights, "temperature": 0.8, **penalty},
        {"kind": "gspo", "cu_seqlens": sequences},
        {"kind": "gspo", "cu_seqlens": sequences, "weights": weights, "temperature": 0.8, **penalty},
    ]

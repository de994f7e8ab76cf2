class QuantizedTensor: ...  # Megatron asks whether a tensor is one

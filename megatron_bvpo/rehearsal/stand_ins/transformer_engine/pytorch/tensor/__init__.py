"""Quantized tensor classes: only names, so that `isinstance` answers False."""


class QuantizedTensor:
    """No tensor of the stand-in is one."""


class Float8Tensor(QuantizedTensor):
    pass


class MXFP8Tensor(QuantizedTensor):
    pass


class Float8BlockwiseQTensor(QuantizedTensor):
    pass


class NVFP4Tensor(QuantizedTensor):
    pass


__all__ = ["Float8BlockwiseQTensor", "Float8Tensor", "MXFP8Tensor", "NVFP4Tensor", "QuantizedTensor"]

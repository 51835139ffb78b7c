"""FX graph mode's internals, imported in one place: if a new torch breaks them, it breaks here."""

# torch.ao.quantization.backend_config reaches for its own utils without importing them
import torch.ao.quantization.backend_config.utils as backend_config_utils
from torch.ao.nn.intrinsic import ConvAdd2d, ConvAddReLU2d
from torch.ao.nn.intrinsic.qat.modules.conv_fused import _ConvBnNd as FusedConvBatchNorm
from torch.ao.nn.intrinsic.qat.modules.linear_fused import LinearBn1d as FusedLinearBatchNorm
from torch.ao.nn.quantized import Embedding as QuantizedEmbedding
from torch.ao.nn.quantized import FloatFunctional, FXFloatFunctional
from torch.ao.nn.quantized import Softmax as QuantizedSoftmax
from torch.ao.nn.quantized.dynamic import Linear as DynamicLinear
from torch.ao.nn.quantized.dynamic.modules.rnn import RNNBase as DynamicRecurrent
from torch.ao.nn.quantized.modules.linear import LinearPackedParams
from torch.ao.nn.quantized.reference.modules.utils import ReferenceQuantizedModule
from torch.ao.quantization.backend_config import (
    BackendConfig,
    BackendPatternConfig,
    DTypeConfig,
    DTypeWithConstraints,
    ObservationType,
    get_executorch_backend_config,
    get_native_backend_config,
    get_onednn_backend_config,
    get_qnnpack_backend_config,
    get_tensorrt_backend_config,
)
from torch.ao.quantization.fx._lower_to_native_backend import (
    _lower_to_native_backend as lower_to_native_backend,
)
from torch.ao.quantization.fx._lower_to_native_backend import (
    is_copy_node,
    is_fixed_qparams_node,
    is_general_tensor_shape_node,
    is_other_node,
)
from torch.ao.quantization.fx.convert import convert
from torch.ao.quantization.fx.custom_config import ConvertCustomConfig, PrepareCustomConfig
from torch.ao.quantization.fx.fuse import _find_matches as find_fusions
from torch.ao.quantization.fx.fuse import fuse
from torch.ao.quantization.fx.fuse_handler import _get_fusion_pattern_to_fuse_handler_cls
from torch.ao.quantization.fx.match_utils import _find_matches as find_quantizable
from torch.ao.quantization.fx.pattern_utils import _sorted_patterns_dict
from torch.ao.quantization.fx.prepare import (
    _is_input_arg_dtype_supported_by_backend,
    _is_output_dtype_supported_by_backend,
    prepare,
)
from torch.ao.quantization.fx.qconfig_mapping_utils import _generate_node_name_to_qconfig
from torch.ao.quantization.fx.quantize_handler import (
    QuantizeHandler,
    _get_pattern_to_quantize_handlers,
)
from torch.ao.quantization.fx.tracer import QuantizationTracer
from torch.ao.quantization.fx.utils import (
    _qconfig_satisfies_dtype_config_constraints,
    all_node_args_have_no_tensors,
    assert_and_get_unique_device,
    node_arg_is_bias,
    node_arg_is_weight,
)
from torch.ao.quantization.qconfig import _is_reuse_input_qconfig
from torch.ao.quantization.qconfig_mapping import QConfigMapping
from torch.ao.quantization.quantize import propagate_qconfig_, quantize_dynamic
from torch.ao.quantization.quantize_fx import _swap_ff_with_fxff as swap_float_functional
from torch.ao.quantization.quantize_fx import attach_preserved_attrs_to_model
from torch.ao.quantization.utils import get_qconfig_dtypes, weight_is_quantized

TWO_INPUT_FUSIONS = (ConvAdd2d, ConvAddReLU2d)

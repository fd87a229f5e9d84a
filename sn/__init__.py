"""Switchable Normalization: layers that learn which statistics to normalise with.

`import sn` needs torch and nothing else. Source: Luo et al., arXiv 1806.10779.
"""

from . import functional
from .batch_average import batch_average
from .convert import NormAct, convert
from .fold import fold
from .freezing import freeze, unfreeze
from .functional import STATISTICS
from .hooks import begin_step, connect
from .kernels import backend, switch_norm
from .modules import (
    SwitchNorm1d,
    SwitchNorm2d,
    SwitchNorm3d,
    SwitchNormAct2d,
    SwitchNormRecurrent,
    gates,
    importance_weights,
    parameter_groups,
    set_virtual_gpus,
)
from .norms import (
    AutoGroupNorm,
    FrozenBatchNorm,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    NoNorm,
    make_norm,
)
from .recurrent import SwitchNormLSTM, SwitchNormLSTMCell
from .variants.batch_kalman import (
    BatchKalmanNorm1d,
    BatchKalmanNorm2d,
    BatchKalmanNorm3d,
    connect_bkn,
)
from .variants.batch_renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from .variants.sparse import (
    SparseSwitchNorm1d,
    SparseSwitchNorm2d,
    SparseSwitchNorm3d,
    set_radius,
    sparsestmax,
    unfreeze_gates,
)
from .variants.sync import (
    SyncSwitchNorm1d,
    SyncSwitchNorm2d,
    SyncSwitchNorm3d,
    convert_sync_switchnorm,
)
from .version import __version__

__all__ = [
    "STATISTICS",
    "AutoGroupNorm",
    "BatchKalmanNorm1d",
    "BatchKalmanNorm2d",
    "BatchKalmanNorm3d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "FrozenBatchNorm",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "NoNorm",
    "NormAct",
    "SparseSwitchNorm1d",
    "SparseSwitchNorm2d",
    "SparseSwitchNorm3d",
    "SwitchNorm1d",
    "SwitchNorm2d",
    "SwitchNorm3d",
    "SwitchNormAct2d",
    "SwitchNormLSTM",
    "SwitchNormLSTMCell",
    "SwitchNormRecurrent",
    "SyncSwitchNorm1d",
    "SyncSwitchNorm2d",
    "SyncSwitchNorm3d",
    "__version__",
    "backend",
    "batch_average",
    "begin_step",
    "connect",
    "connect_bkn",
    "convert",
    "convert_sync_switchnorm",
    "fold",
    "freeze",
    "functional",
    "gates",
    "importance_weights",
    "make_norm",
    "parameter_groups",
    "set_radius",
    "set_virtual_gpus",
    "sparsestmax",
    "switch_norm",
    "unfreeze",
    "unfreeze_gates",
]

"""The released behaviour of Uni-Code (repository haihuangcode/CMG), as distinct from the paper's.

Each module has the parameter and buffer names of its released counterpart, so `load_state_dict`
takes a released checkpoint's entries, and computes what the release computes, defects included.
For new work use `mmvq.MultiModalEMAQuantizer`, `mmvq.CLUBEstimator` and `mmvq.CrossCPC`.
"""

from mmvq.compat.cmg.club import CMGCLUB
from mmvq.compat.cmg.cpc import CMGCPCOutput, CMGCrossCPC
from mmvq.compat.cmg.quantizer import CMGQuantizer, CMGQuantizerOutput

__all__ = ["CMGCLUB", "CMGCPCOutput", "CMGCrossCPC", "CMGQuantizer", "CMGQuantizerOutput"]

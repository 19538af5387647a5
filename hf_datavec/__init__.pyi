from hf_datavec.api import MergeResult as MergeResult
from hf_datavec.api import TaskVector as TaskVector
from hf_datavec.api import merge as merge

__version__: str

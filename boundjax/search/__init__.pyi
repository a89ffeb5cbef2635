from .method import LADDER as LADDER
from .programs import Programs as Programs
from .search import Counterexample as Counterexample
from .search import Result as Result
from .search import verify as verify

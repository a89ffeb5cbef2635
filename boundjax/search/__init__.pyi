from .method import LADDER as LADDER
from .programs import Programs as Programs
from .prove import prove as prove
from .result import Counterexample as Counterexample
from .result import Result as Result
from .search import verify as verify

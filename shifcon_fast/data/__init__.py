"""Reading parallel sentences, instructions and questions from files, datasets and memory; language codes."""

from shifcon_fast.data.errors import DataError
from shifcon_fast.data.instructions import Instruction, Turn, read_instructions
from shifcon_fast.data.parallel import read_parallel
from shifcon_fast.data.questions import Question, read_questions

__all__ = [
    "DataError",
    "Instruction",
    "Question",
    "Turn",
    "read_instructions",
    "read_parallel",
    "read_questions",
]

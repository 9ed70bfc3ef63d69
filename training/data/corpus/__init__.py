"""Text sources: the documents of a run, whatever files hold them, and which of them are kept for validation."""

from training.data.corpus.parts import Part, Report, Split
from training.data.corpus.source import Corpus, open_corpus

__all__ = ["Corpus", "Part", "Report", "Split", "open_corpus"]

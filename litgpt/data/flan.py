"""The FLAN data set: 66 tasks of language research, each worded as instructions in ten ways."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from litgpt.data.base import SFTModule
from litgpt.data.download import download_if_missing
from litgpt.data.hf import renamed
from litgpt.data.json_data import load_split
from litgpt.errors import UserError, did_you_mean
from litgpt.prompts import PromptStyle

COLUMNS = {"instruction": "inputs", "output": "targets"}
TEMPLATES = "_10templates"  # ends every subset's name
SUBSETS = """
aeslc ag_news_subset anli_r1 anli_r2 anli_r3 arc_challenge arc_easy bool_q cb cnn_dailymail cola common_gen copa coqa cosmos_qa dart
definite_pronoun_resolution drop e2e_nlg fix_punct gigaword glue_mrpc glue_qqp hellaswag imdb_reviews math_dataset mnli_matched
mnli_mismatched multi_news multirc natural_questions openbookqa opinion_abstracts_idebate opinion_abstracts_rotten_tomatoes
para_crawl_enes paws_wiki piqa qnli quac record rte samsum sentiment140 snli squad_v1 squad_v2 sst2 story_cloze stsb trec trivia_qa
true_case web_nlg_en wic wiki_lingua_english_en wmt14_enfr wmt16_translate_csen wmt16_translate_deen wmt16_translate_fien
wmt16_translate_roen wmt16_translate_ruen wmt16_translate_tren wnli word_segment wsc yelp_polarity_reviews
""".split()


@dataclass(eq=False)
class FLAN(SFTModule):
    """The FLAN data set: 66 tasks of language research, each worded as instructions in ten ways, downloaded once."""

    prompt_style: str | PromptStyle | None = field(default="flan", kw_only=True)
    """How a prompt is written."""
    download_dir: Path = Path("./data/flan")
    """The folder that the files are kept in."""
    url: str = "https://huggingface.co/datasets/Muennighoff/flan/resolve/main"
    """Where the files come from."""
    subsets: str | None = None
    """The tasks to read, separated by commas, such as `cola_10templates,arc_easy_10templates`. By default all of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = SUBSETS if self.subsets is None else [name.strip().removesuffix(TEMPLATES) for name in self.subsets.split(",")]
        if unknown := [name for name in names if name not in SUBSETS]:
            hint = did_you_mean(unknown[0], SUBSETS) or f" There are {', '.join(SUBSETS)}."
            raise UserError(f"`subsets` names tasks of FLAN, separated by commas, but {unknown[0]!r} is none.{hint}")
        self._names = list(dict.fromkeys(names))

    def prepare_data(self) -> None:
        """Download the files, unless they are there."""
        for part in ("train", "test"):
            for file in self._files(part):
                download_if_missing(file, f"{self.url}/{part}/{file.name}")

    def records(self) -> tuple[Sequence[Mapping], Sequence[Mapping]]:
        """The samples to train on and those to validate on."""
        convert = partial(renamed, columns=COLUMNS)
        return tuple([record for file in self._files(part) for record in load_split(file, convert)] for part in ("train", "test"))

    def _files(self, part: str) -> list[Path]:
        return [Path(self.download_dir) / f"{name}{TEMPLATES}_{part}.jsonl" for name in self._names]

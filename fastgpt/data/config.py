"""What is said of the data: where it comes from, how it is divided, how it fills a batch."""

from dataclasses import dataclass

FORMATS = ("auto", "text", "jsonl", "dataset")
REPEATS = ("auto", "paragraphs", "documents", "none")
PACKINGS = ("concat", "documents")


@dataclass(frozen=True)
class DataConfig:
    """The data of a run.

    Attributes:
        files: what to read, in this order: UTF-8 text files, JSONL files, or Hugging Face datasets,
            "name", "name:subset", "name@split" or "name:subset@split", where a name may be a
            folder's and the split is "train" if none is named. One folder that `prepare` made is
            used as it is.
        held_out_files: the same, to evaluate on; then all of files is trained on, but for what is
            in these. None: a share of files is held out.
        format: "text", "jsonl" or "dataset" (needs the package datasets); "auto" goes by the name:
            .jsonl and .ndjson are JSONL, all else is text.
        separator: in text files, what stands between two documents; None: a file is one document.
        text_field: where a JSON record or a row of a dataset keeps its text, if not as prompt and
            completion or as messages.
        turn: how a message of a chat is written, by its role and content; special tokens of the
            tokenizer may stand in it. The assistant's content, and what follows it here, takes part
            in the loss.
        tokenizer: a tokenizer.json to use; None trains one on the training part.
        vocab_size: ids of a tokenizer that is trained.
        held_out: share of files that is held out to evaluate on, if there are no held_out_files.
        deduplicate: what is kept only the first time that it comes: "documents"; "paragraphs" of 40
            characters or more, and documents; "auto": paragraphs of a text file without separator,
            documents elsewhere; or "none": then what comes again stays in the part of the first.
        packing: how a batch is filled. "concat": windows of all tokens end to end;
            "documents": whole documents side by side, where attention and positions end with each.
        shard_bytes: text of a shard; what a kill while preparing loses at most.
    """

    files: tuple[str, ...] = ()
    held_out_files: tuple[str, ...] = ()
    format: str = "auto"
    separator: str | None = None
    text_field: str = "text"
    turn: str = "<|{role}|>\n{content}\n"
    tokenizer: str | None = None
    vocab_size: int = 2048
    held_out: float = 0.1
    deduplicate: str = "auto"
    packing: str = "concat"
    shard_bytes: int = 2**26

    def __post_init__(self) -> None:
        for name, allowed in (("format", FORMATS), ("deduplicate", REPEATS), ("packing", PACKINGS)):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"data: {name} must be one of {', '.join(allowed)}; got {value!r}")
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"data: held_out must lie in (0, 1); got {self.held_out}")
        for name, least in (("vocab_size", 1), ("shard_bytes", 1)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"data: {name} must be at least {least}; got {value}")
        if self.separator == "":
            raise ValueError("data: separator must not be empty; leave it out for none")
        if self.turn.count("{content}") != 1 or "{role}" in self.turn.split("{content}")[1]:
            raise ValueError(
                "data: turn must hold {content} once, and {role} before it only;"
                f" got {self.turn!r}"
            )

    @property
    def sources(self) -> tuple[str, ...]:
        """All that is read, in its order: what is held out comes first, as it must not recur."""
        return (*self.held_out_files, *self.files)

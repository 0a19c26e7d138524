"""A toy language pair, and untrained models of it in every shape."""

import json
import random
from pathlib import Path

import sentencepiece
import torch

from mtmoe.checkpoint import LanguageSet, StoredModel, TransformerConfig
from mtmoe.checkpoint.checksums import write_checksums
from mtmoe.checkpoint.stored import expected_shapes
from mtmoe.moe import MoEConfig

LANGUAGES = ("de", "en", "mk")
DIRECTIONS = ("de-en", "en-de", "en-mk", "mk-en")
WORDS = [f"{first}{second}" for first in "kltmnrs" for second in ("a", "e", "i", "o", "u", "an", "er")]


def toy_sentence(seed: int, longest: int = 9) -> str:
    """A sentence of the toy language."""
    generator = random.Random(seed)
    return " ".join(generator.choice(WORDS) for _ in range(generator.randint(1, longest)))


def toy_translation(text: str) -> str:
    """What a model should learn: each word with an x at its end."""
    return " ".join(f"{word}x" for word in text.split())


def write_toy_vocabulary(folder: Path) -> Path:
    """spm.model, dict.txt and languages.json of the toy pair, as `mtmoe prepare` lays them down."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [toy_sentence(seed) for seed in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts + [toy_translation(text) for text in texts]),
        model_prefix=str(folder / "spm"),
        vocab_size=60,
        minloglevel=3,
    )
    (folder / "spm.vocab").unlink()
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    pieces = [processor.id_to_piece(index) for index in range(3, processor.get_piece_size())]
    tags = [f"__{language}__" for language in LANGUAGES]
    (folder / "dict.txt").write_text("".join(f"{piece} 1\n" for piece in pieces + tags), encoding="utf-8")
    languages = {"languages": LANGUAGES, "directions": DIRECTIONS}
    (folder / "languages.json").write_text(json.dumps(languages), encoding="utf-8")
    return folder


def toy_config(**changes) -> TransformerConfig:
    """A small dense shape; every second layer gets four experts with CMR and EOM by `moe`, with MoEC by `moec`,
    with SMILE by `bilevel`."""
    experts = None
    if changes.pop("moe", False):
        experts = MoEConfig(d_model=16, d_ffn=24, num_experts=4, top_k=2, eom=0.2, cmr=True)
    if changes.pop("moec", False):
        experts = MoEConfig(
            d_model=16, d_ffn=24, num_experts=4, gate="moec", top_k=1, normalize_weights="none", cosine_gate_dim=5,
            expert_clusters=2, cluster_expert_dropout=0.5,
        )  # fmt: skip
    if changes.pop("bilevel", False):
        experts = MoEConfig(
            d_model=16, d_ffn=24, num_experts=4, gate="bilevel", expert_nodes=2, top_k=2, normalize_weights="none"
        )
    if experts is not None:
        changes = {
            "encoder_moe": experts,
            "decoder_moe": experts,
            "encoder_moe_freq": 2,
            "decoder_moe_freq": 2,
        } | changes
    values = {
        "vocabulary_size": 64,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_heads": 2,
        "decoder_heads": 2,
        "encoder_d_ffn": 32,
        "decoder_d_ffn": 24,
        "encoder_pre_norm": True,
        "decoder_pre_norm": True,
        "encoder_learned_positions": False,
        "decoder_learned_positions": False,
        "max_source_positions": 64,
        "max_target_positions": 64,
        "activation": "relu",
        "scale_embedding": True,
        "layernorm_embedding": False,
        "share_all_embeddings": True,
        "share_decoder_input_output_embed": True,
        "encoder_moe_freq": 0,
        "decoder_moe_freq": 0,
        "encoder_moe": None,
        "decoder_moe": None,
    }
    return TransformerConfig(**(values | changes))


def toy_tensors(config: TransformerConfig, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random weights, large enough that tokens differ clearly in probability."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.1) + ("norm.weight" in name)
        for name, shape in expected_shapes(config).items()
    }


def toy_model(vocabulary: Path, seed: int = 1, **changes) -> StoredModel:
    """An untrained model with the vocabulary that `write_toy_vocabulary` wrote."""
    rows = 4 + len((vocabulary / "dict.txt").read_text(encoding="utf-8").splitlines())
    config = toy_config(**({"vocabulary_size": rows} | changes))
    languages = LanguageSet(LANGUAGES, DIRECTIONS, "src")
    return StoredModel(config, toy_tensors(config, seed), vocabulary / "dict.txt", vocabulary / "spm.model", languages)


def seal(folder: Path) -> None:
    """Give a changed model folder the checksums of what it holds now."""
    names = {path.name for path in folder.iterdir()} - {"checksums.json", "README.md"}
    write_checksums(folder, dict.fromkeys(names, ""))


def as_version_1(folder: Path) -> None:
    """Make a model folder what version 1 would have written."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({"format": "mtmoe", "version": 1, "model": values["model"]}))
    languages = json.loads((folder / "languages.json").read_text(encoding="utf-8"))
    del languages["decoder_start"]
    (folder / "languages.json").write_text(json.dumps(languages))
    for name in ("checksums.json", "README.md"):
        (folder / name).unlink()

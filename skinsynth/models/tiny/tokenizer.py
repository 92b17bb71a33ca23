"""A CLIPTokenizer with a small vocabulary: byte-level BPE in CLIP's form, learnt from the words of this field."""
import itertools
import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import CLIPTokenizer

DIAGNOSES = ("melanoma", "nevus", "melanocytic nevus", "dysplastic nevus", "seborrheic keratosis", "lentigo", "solar lentigo",
             "lentigo maligna", "lichenoid keratosis", "actinic keratosis", "basal cell carcinoma", "squamous cell carcinoma",
             "dermatofibroma", "vascular lesion", "angioma", "atypical melanocytic proliferation",
             "cafe-au-lait macule", "unknown")
SITES = ("head/neck", "torso", "anterior torso", "posterior torso", "lateral torso", "upper extremity", "lower extremity",
         "palms/soles", "oral/genital", "face", "scalp", "ear", "neck", "chest", "abdomen", "back", "trunk", "arm", "hand", "leg",
         "foot", "acral")
WORDS = """benign malignant skin lesion mole dermoscopy dermoscopic dermatoscopic image photo photograph picture close-up macro of
a an the with and without on in sks patient aged year years old male female man woman sex age site diagnosis typical atypical
irregular regular symmetric asymmetric asymmetry border colour color colours colors diameter pigment pigmented network globules
dots streaks pseudopods blue-white veil blue grey gray white red black brown dark light tan pink regression milia-like cysts
comedo-like openings vessels structureless hair ruler bubbles vignette polarized blurred sharp small medium-sized large high low
quality class type i ii iii iv v vi fitzpatrick cancer tumor tumour suspicious isic ham10000 siim"""
START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(captions: Iterable[str], vocabulary: int = 1600) -> CLIPTokenizer:
    """Learns merges from `captions` and from the field's words; any other text still works, in smaller pieces."""
    prompts = [f"a dermoscopy image of {kind} {diagnosis} on the {site} of a {age} year old {sex} patient"
               for kind, diagnosis, site, sex, age in zip(itertools.cycle(("benign", "malignant")), DIAGNOSES * 2,
                                                          itertools.cycle(SITES), itertools.cycle(("female", "male")),
                                                          range(10, 90, 5), strict=False)]
    phrases = (*DIAGNOSES, *SITES, *WORDS.split())
    corpus = [*captions, *prompts * 4, *(f"{phrase} {phrase}" for phrase in phrases for _ in range(3))]
    tokenizer = CLIPTokenizer()  # for its normaliser and pre-tokeniser
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = tokenizer.backend_tokenizer.normalizer or normalizers.Lowercase()
    learner.pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    symbols = _byte_symbols()
    learner.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=vocabulary, min_frequency=2, initial_alphabet=symbols, end_of_word_suffix="</w>", show_progress=False))
    merges = _merges(learner)[:vocabulary - 2 * 256 - 2]
    # CLIP's order: bytes, bytes at the end of a word, merges, special tokens.
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(merge) for merge in merges), START, END]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def _byte_symbols() -> list[str]:
    """The 256 printable characters that stand for bytes, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _merges(learner: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]

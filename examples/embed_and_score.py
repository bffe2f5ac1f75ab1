"""Search texts by meaning, and answer a question by choosing among answers.

Run it with: python examples/embed_and_score.py [MODEL]
"""

import sys

from litgpt import LLM

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEXTS = ["Llamas eat grass, hay and leaves.", "The moon is far away.", "Bread keeps fresh in a wooden box.", "Owls hunt mice at night."]


def nearest(llm: LLM, query: str, texts: list[str]) -> list[tuple[float, str]]:
    """Return the texts and their cosines with the query, the nearest first."""
    query_vector, *vectors = llm.embed([query, *texts], normalized=True)
    return sorted(((float(query_vector @ vector), text) for vector, text in zip(vectors, texts, strict=True)), reverse=True)


def choose(llm: LLM, question: str, answers: list[str]) -> str:
    """Return the answer that the model holds to be the likeliest, by the mean over its tokens, so that short ones have no advantage."""
    messages = [{"role": "user", "content": question}]
    scores = [sum(each) / len(each) for each in llm.score([(messages, answer) for answer in answers], per_token=True)]
    return answers[scores.index(max(scores))]


def main(model: str = MODEL) -> None:
    """Show both."""
    llm = LLM.load(model)
    for cosine, text in nearest(llm, "What food do llamas like?", TEXTS):
        print(f"{cosine:.3f}  {text}")
    print(choose(llm, "What do owls eat?", ["Mice.", "Bread.", "Stones."]))


if __name__ == "__main__":
    main(*sys.argv[1:])

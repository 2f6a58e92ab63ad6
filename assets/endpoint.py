"""A judge at an OpenAI-compatible URL, for pop.py --judge_url and eval.py --judge."""
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import openai

from assets.checks import fail


class Endpoint:
    """Has the method `generate` of pop.Engine, as pop.ask needs it. Exits if it does not answer.

    url: of the API, such as http://host/v1; the key is in $OPENAI_API_KEY. gather: pop.gather, so
    that of several ranks the first one asks and all get the replies. scoring: as in pop.py; with
    "expected" it must give log-probs, too. flag: what gave the URL.
    """

    def __init__(self, url: str, model: str, gather: Callable[[Any], list[Any]],
                 scoring: str, flag: str = "--judge_url") -> None:
        key = os.environ.get("OPENAI_API_KEY", "none")
        self.client = openai.OpenAI(base_url=url, api_key=key, timeout=120, max_retries=4)
        self.model = model
        self.gather = gather
        hello = SimpleNamespace(messages=[dict(role="user", content="Hello")], temperature=0.0,
                                seed=0, max_tokens=9, schema=None,
                                next_words=["Yes"] if scoring == "expected" else None)
        reply = self.complete(hello)
        if reply.finish_reason == "endpoint":
            fail(f"{flag} {url} --judge_model {model}: {' '.join(reply.text.split())}")

    def generate(self, requests: Sequence[Any], role: str) -> list[SimpleNamespace]:
        """A reply (text, finish_reason) to each pop.Request, 32 at once."""
        replies = None
        if int(os.environ.get("RANK", 0)) == 0:
            with ThreadPoolExecutor(32) as pool:
                replies = list(pool.map(self.complete, requests))
        return self.gather(replies)[0]

    def complete(self, request: Any) -> SimpleNamespace:
        """What fails 5 times comes back with finish_reason "endpoint" and the error as its text.

        engine_logprobs: of request.next_words as the first token, or [] if not all of them are
        among the 20 likeliest tokens, which is as far as an endpoint tells.
        """
        options = {}
        if request.schema:
            schema = dict(name="reply", schema=request.schema)
            options["response_format"] = dict(type="json_schema", json_schema=schema)
        if request.next_words:
            options |= dict(logprobs=True, top_logprobs=20)
        try:
            response = self.client.chat.completions.create(
                model=self.model, messages=request.messages, temperature=request.temperature,
                seed=request.seed, max_completion_tokens=request.max_tokens, **options)
            choice = response.choices[0]
            logprobs = []
            if request.next_words:
                likeliest = choice.logprobs.content[0].top_logprobs
                found = {candidate.token: candidate.logprob for candidate in likeliest}
                if set(request.next_words) <= set(found):
                    logprobs = [float(found[word]) for word in request.next_words]
            text = "" + (choice.message.content or "")    # TypeError if it is no text
            return SimpleNamespace(text=text, engine_logprobs=logprobs,
                                   finish_reason=choice.finish_reason)
        except openai.OpenAIError as error:
            reason = str(error)
        except (AttributeError, IndexError, TypeError) as error:    # status 200, but no completion
            reason = f"not a completion: {error}"
        return SimpleNamespace(text=reason, engine_logprobs=[], finish_reason="endpoint")

"""The official openai package against a server: openai_client.py URL KEY. Exits non-zero at the first surprise."""
import asyncio
import concurrent.futures
import sys

import openai

url, key = sys.argv[1:3]
client = openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0)
messages = [{"role": "user", "content": "What is the capital of Germany?"}]

assert [model.id for model in client.models.list()] == ["tiny"]
answer = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=20)
assert "Berlin" in answer.choices[0].message.content, answer
assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens

stream = client.chat.completions.create(
    model="tiny", messages=messages, temperature=0, max_tokens=20, stream=True, stream_options={"include_usage": True})
chunks = list(stream)
text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
assert text == answer.choices[0].message.content, (text, answer)
assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens

several = client.completions.create(model="tiny", prompt="The sky is", n=2, max_tokens=4, logprobs=2, seed=1)
assert len(several.choices) == 2 and len(several.choices[1].logprobs.token_logprobs) == 4, several
scored = client.chat.completions.create(
    model="tiny", messages=messages, max_tokens=3, logprobs=True, top_logprobs=2)
assert len(scored.choices[0].logprobs.content[0].top_logprobs) == 2


def expect(error, **changes):
    arguments = {"model": "tiny", "messages": messages, "max_tokens": 2} | changes
    try:
        client.chat.completions.create(**arguments)
    except error as caught:
        return caught
    raise AssertionError(f"no {error.__name__} for {changes}")


assert expect(openai.NotFoundError, model="other").code == "model_not_found"
assert expect(openai.BadRequestError, temperature=9).param == "temperature"
assert expect(openai.BadRequestError, max_tokens=10**6).code == "context_length_exceeded"
try:
    openai.OpenAI(base_url=url + "/v1", api_key="wrong", max_retries=0).models.list()
    raise AssertionError("a wrong key is taken")
except openai.AuthenticationError:
    pass

# More than the queue takes: without retries some are refused, with the client's own retries all get through.
def ask(retries):
    patient = client.with_options(max_retries=retries)
    return patient.completions.create(model="tiny", prompt="One, two,", max_tokens=40, extra_body={"ignore_eos": True})


with concurrent.futures.ThreadPoolExecutor(12) as pool:
    impatient = [pool.submit(ask, 0) for _ in range(12)]
    errors = [future.exception() for future in impatient]
    assert any(isinstance(error, openai.RateLimitError) for error in errors), errors
    assert all(error is None or isinstance(error, openai.RateLimitError) for error in errors), errors
    patient = [pool.submit(ask, 20) for _ in range(6)]
    assert all(future.result().usage.completion_tokens == 40 for future in patient)


async def concurrently():
    several = openai.AsyncOpenAI(base_url=url + "/v1", api_key=key)
    async def one():
        stream = await several.chat.completions.create(
            model="tiny", messages=messages, temperature=0, max_tokens=20, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
    return await asyncio.gather(one(), one(), one())

assert set(asyncio.run(concurrently())) == {answer.choices[0].message.content}
print("ok")

"""Python clients, as they come, against a running server: clients.py BASE_URL KEY MODEL [CLIENT...]

A tour a client: text whole and streamed, a call of a tool and its result, an answer held to a schema,
over each surface that the client speaks. BASE_URL ends in /v1, the server runs with --dialect openai and
a real model; CLIENT is a function's name below (default: all). A client whose package is missing is
skipped. They are run by hand, for CI has not the time:

    pip install langchain-openai litellm 'pydantic-ai-slim[openai]' instructor llm openai-agents
    ./server --dialect openai --model qwen2.5-coder-0.5b-instruct-q4_k_m.gguf --alias qwen --api-key $KEY
    python tests/sdk/clients.py http://127.0.0.1:8080/v1 $KEY qwen

What a small model says does not matter, whatever it is: its form does. So calls are made sure of by
tool_choice, and temperature is 0 where the same answer must come twice.
"""
import asyncio
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import typing

import pydantic

base_url, key, model = sys.argv[1:4]
root = base_url.removesuffix("/v1")
question = "Is it cold in Oslo?"
short = "What is the capital of France?"  # its answer ends by itself
story = "Tell me a story of a king."


class Guest(pydantic.BaseModel):
    """Who comes."""
    name: typing.Literal["Ann", "Bob"]
    comes: bool


def check(condition, what):
    if not condition:
        raise AssertionError(what)


def weather(city: str) -> str:
    """The weather in a city.

    Args:
        city: The name of the city.
    """
    return f"It rains in {city}."


weather_schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 16}},
                  "required": ["city"], "additionalProperties": False}
weather_tool = {"type": "function", "function": {"name": "weather", "strict": True, "parameters": weather_schema,
                                                 "description": "The weather in a city."}}


def langchain_openai():
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI
    for responses in (False, True):
        chat = ChatOpenAI(base_url=base_url, api_key=key, model=model, temperature=0, max_tokens=100,
                          use_responses_api=responses, stream_usage=True, max_retries=0)
        whole = chat.invoke([("system", "Be brief."), ("human", short)])
        check(whole.text and whole.usage_metadata["output_tokens"] > 0, whole)
        pieces = list(chat.stream([("system", "Be brief."), ("human", short)]))
        total = pieces[0]
        for piece in pieces[1:]:
            total += piece
        check(len(pieces) > 3 and total.text == whole.text, f"{total}\nis not\n{whole}")
        check(total.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"], total)
        calling = chat.bind_tools([tool(weather)], tool_choice="weather", strict=True)
        called = calling.invoke(question)
        check([call["name"] for call in called.tool_calls] == ["weather"], called)
        streamed = None
        for piece in calling.stream(question):
            streamed = piece if streamed is None else streamed + piece
        check(streamed.tool_calls[0]["args"] == called.tool_calls[0]["args"], f"{streamed}\nis not\n{called}")
        result = ToolMessage(weather(**called.tool_calls[0]["args"]), tool_call_id=called.tool_calls[0]["id"])
        final = chat.bind_tools([tool(weather)]).invoke([HumanMessage(question), called, result])
        check(final.text or final.tool_calls, final)
        for method in ("json_schema", "function_calling"):
            guest = chat.with_structured_output(Guest, method=method).invoke("Ann comes.")
            check(isinstance(guest, Guest), guest)


def litellm():
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it looks for prices on the net
    import litellm
    litellm.telemetry = False
    litellm.suppress_debug_info = True
    for prefix, api_base in (("openai/", base_url), ("hosted_vllm/", base_url), ("anthropic/", root)):
        said = {"model": prefix + model, "api_base": api_base, "api_key": key, "temperature": 0, "max_tokens": 64,
                "num_retries": 0}
        whole = litellm.completion(**said, messages=[{"role": "user", "content": story}])
        text = whole.choices[0].message.content
        check(text and whole.usage.completion_tokens > 0, whole)
        check(whole.choices[0].finish_reason == "length", whole)
        pieces = list(litellm.completion(**said, messages=[{"role": "user", "content": story}], stream=True,
                                         stream_options={"include_usage": True}))
        check("".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == text, pieces)
        check(litellm.stream_chunk_builder(pieces).usage.completion_tokens == whole.usage.completion_tokens,
              pieces[-1])
        choice = {"type": "function", "function": {"name": "weather"}}
        asked = [{"role": "user", "content": question}]
        called = litellm.completion(**said, messages=asked, tools=[weather_tool], tool_choice=choice)
        call = called.choices[0].message.tool_calls[0]
        check(call.function.name == "weather" and "city" in json.loads(call.function.arguments), called)
        pieces = list(litellm.completion(**said, messages=asked, tools=[weather_tool], tool_choice=choice,
                                         stream=True))
        built = litellm.stream_chunk_builder(pieces).choices[0].message.tool_calls[0]
        check(json.loads(built.function.arguments) == json.loads(call.function.arguments), built)
        asked += [called.choices[0].message.model_dump(exclude_none=True),
                  {"role": "tool", "tool_call_id": call.id, "content": "It rains."}]
        final = litellm.completion(**said, messages=asked, tools=[weather_tool])
        check(final.choices[0].message.content or final.choices[0].message.tool_calls, final)
        held = litellm.completion(**said, messages=[{"role": "user", "content": "Ann comes."}],
                                  response_format=Guest)
        Guest.model_validate_json(held.choices[0].message.content)
    said = {"model": "openai/" + model, "api_base": base_url, "api_key": key, "temperature": 0,
            "max_output_tokens": 24, "input": story}
    whole = litellm.responses(**said)
    text = whole.output[0].content[0].text
    events = list(litellm.responses(**said, stream=True))
    check(events[-1].type in ("response.completed", "response.incomplete"), events[-1])
    check("".join(event.delta for event in events if event.type == "response.output_text.delta") == text, events)


def pydantic_ai():
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    async def tour(kind):
        remote = kind(model, provider=OpenAIProvider(base_url=base_url, api_key=key))
        settings = {"temperature": 0, "max_tokens": 100}
        agent = Agent(remote, instructions="Be brief.", model_settings=settings)
        whole = await agent.run(short)
        async with agent.run_stream(short) as stream:
            texts = [piece async for piece in stream.stream_text(delta=True, debounce_by=None)]
        check(len(texts) > 3 and "".join(texts) == whole.output, f"{''.join(texts)}\nis not\n{whole.output}")
        check(whole.usage.output_tokens > 0, whole.usage)
        for output in (Guest, NativeOutput(Guest)):
            held = Agent(remote, output_type=output, model_settings=settings)
            check(isinstance((await held.run("Ann comes.")).output, Guest), output)
            async with held.run_stream("Ann comes.") as stream:
                check(isinstance(await stream.get_output(), Guest), output)
        asked = []

        def rain(city: typing.Literal["Oslo", "Paris"]) -> str:
            """The weather in a city."""
            asked.append(city)
            return f"It rains in {city}."

        # With an output that is a tool, too, every turn must call: the first may be either.
        caller = Agent(remote, tools=[rain], output_type=Guest, model_settings=settings)
        result = await caller.run("Call rain for Oslo, then say whether Ann comes.")
        check(isinstance(result.output, Guest), result)
        again = await agent.run("And then?", message_history=whole.all_messages())
        check(again.output, again)

    asyncio.run(tour(OpenAIChatModel))
    asyncio.run(tour(OpenAIResponsesModel))


def instructor():
    import instructor
    import openai
    client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=0)
    asked = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": "Ann comes."}],
             "max_retries": 0, "response_model": Guest}
    modes = instructor.Mode
    for mode in (modes.TOOLS, modes.TOOLS_STRICT, modes.JSON_SCHEMA, modes.PARALLEL_TOOLS,
                 modes.RESPONSES_TOOLS):
        request = dict(asked)
        if mode == modes.PARALLEL_TOOLS:
            request["response_model"] = typing.Iterable[Guest]
            request["tool_choice"] = "required"
        if mode != modes.RESPONSES_TOOLS:
            request["max_tokens"] = 64
        patched = instructor.from_openai(client, mode=mode)
        guest = patched.chat.completions.create(**request)
        guests = list(guest) if mode == modes.PARALLEL_TOOLS else [guest]
        check(guests and all(isinstance(guest, Guest) for guest in guests), f"{mode}: {guests}")
        if mode not in (modes.PARALLEL_TOOLS, modes.RESPONSES_TOOLS):
            parts = list(patched.chat.completions.create_partial(**request))
            check(parts and parts[-1].name == guest.name, f"{mode}: {parts}")


def llm():
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "extra-openai-models.yaml").write_text(
            f"- model_id: local\n  model_name: {model}\n  api_base: {base_url}\n  api_key_name: local\n"
            "  supports_schema: true\n  supports_tools: true\n")
        pathlib.Path(folder, "keys.json").write_text(json.dumps({"local": key}))
        environment = {**os.environ, "LLM_USER_PATH": folder}

        def run(*arguments):
            done = subprocess.run([sys.executable, "-m", "llm", *arguments], env=environment, text=True,
                                  stdin=subprocess.DEVNULL, capture_output=True)
            check(done.returncode == 0, done.stderr)
            return done.stdout

        settings = ["-m", "local", "-o", "max_tokens", "24", "-o", "temperature", "0"]
        whole = run(*settings, "--no-stream", story)
        check(whole.strip() and run(*settings, story) == whole, whole)
        check(run(*settings, "-c", "And then?").strip(), "a conversation that goes on")
        held = run(*settings, "--schema", json.dumps(Guest.model_json_schema()), "Ann comes.")
        Guest.model_validate_json(held)
        check(run(*settings, "--functions", 'def weather(city: str) -> str:\n    "Weather of a city."\n'
                  '    return "rain"\n', question).strip(), "with tools")


def openai_agents():
    import agents
    import openai
    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0)
    asked = []

    @agents.function_tool
    def weather(city: typing.Literal["Oslo", "Paris"]) -> str:
        """The weather in a city."""
        asked.append(city)
        return f"It rains in {city}."

    async def tour(kind):
        remote = kind(model=model, openai_client=client)
        settings = agents.ModelSettings(temperature=0, max_tokens=100, include_usage=True)
        plain = agents.Agent(name="Poet", instructions="Be brief.", model=remote, model_settings=settings)
        whole = await agents.Runner.run(plain, short)
        check(whole.context_wrapper.usage.output_tokens > 0, whole)
        stream = agents.Runner.run_streamed(plain, short)
        texts = [event.data.delta async for event in stream.stream_events()
                 if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"]
        check(len(texts) > 3 and "".join(texts) == whole.final_output == stream.final_output, stream.final_output)
        calls = agents.ModelSettings(temperature=0, max_tokens=100, tool_choice="required")
        caller = agents.Agent(name="Forecaster", model=remote, tools=[weather], model_settings=calls)
        asked.clear()
        result = await agents.Runner.run(caller, question, max_turns=6)
        check(asked and result.final_output, result)
        asked.clear()
        stream = agents.Runner.run_streamed(caller, question, max_turns=6)
        async for _ in stream.stream_events():
            pass
        check(asked and stream.final_output == result.final_output, stream.final_output)
        more = await agents.Runner.run(plain, result.to_input_list() + [{"role": "user", "content": "And Paris?"}])
        check(more.final_output, more)
        held = agents.Agent(name="Host", model=remote, output_type=Guest, model_settings=settings)
        check(isinstance((await agents.Runner.run(held, "Ann comes.")).final_output, Guest), "output_type")
        poet = agents.Agent(name="Other", model=remote, model_settings=settings)
        triage = agents.Agent(name="Triage", model=remote, handoffs=[poet], model_settings=calls)
        result = await agents.Runner.run(triage, short, max_turns=3)
        check(result.last_agent is poet and result.final_output, result)

    async def both():
        await tour(agents.OpenAIResponsesModel)
        await tour(agents.OpenAIChatCompletionsModel)

    asyncio.run(both())


packages = {"langchain_openai": "langchain-openai", "litellm": "litellm", "pydantic_ai": "pydantic-ai-slim",
            "instructor": "instructor", "llm": "llm", "openai_agents": "openai-agents"}
failed = 0
for name in sys.argv[4:] or packages:
    try:
        version = importlib.metadata.version(packages[name])
    except importlib.metadata.PackageNotFoundError:
        print(f"{packages[name]}: not installed, skipped")
        continue
    started = time.monotonic()
    try:
        globals()[name]()
    except Exception as error:
        failed += 1
        print(f"{packages[name]} {version}: {type(error).__name__}: {error}")
        if "VALAR_TRACE" in os.environ:
            raise
    else:
        print(f"{packages[name]} {version}: passed in {time.monotonic() - started:.1f} s", flush=True)
sys.exit(failed > 0)

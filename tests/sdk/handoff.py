"""The official Agents SDK against a running server: handoff.py BASE_URL KEY MODEL

A loop of tools until the final text, and a handoff from one agent to another. A scripted model (fake)
calls what it may until it sees a result; a real one is made to call by tool_choice. Needs PyPI's
openai-agents, used as it comes but for its tracing, which would go to a server of its maker's.
"""
import asyncio
import sys

import agents
import openai

base_url, key, model = sys.argv[1:4]
agents.set_tracing_disabled(True)
agents.set_default_openai_client(openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0))
scripted = model == "fake"
asked = []


@agents.function_tool
def weather(city: str) -> str:
    """The weather of a city."""
    asked.append(city)
    return f"It rains in {city}."


def settings(choice=None):
    return agents.ModelSettings(tool_choice=choice, parallel_tool_calls=False, max_tokens=48,
                                temperature=0)


def check(condition, what):
    if not condition:
        sys.exit(f"handoff.py: {what}")


async def main():
    # After a call the SDK leaves the choice to the model again: only the scripted one then stops.
    if scripted:
        forecaster = agents.Agent(name="Forecaster", model=model, tools=[weather],
                                  model_settings=settings("required"))
        result = await agents.Runner.run(forecaster, "Rain in Oslo?", max_turns=3)
        check(asked == ["Oslo"], f"called with {asked}")
        check("It rains in Oslo." in result.final_output, result.final_output)

    poet = agents.Agent(name="Poet", model=model, instructions="Answer in rhymes.",
                        model_settings=settings())
    triage = agents.Agent(name="Triage", model=model, instructions="Hand off to the poet.",
                          handoffs=[poet], model_settings=settings("required"))
    result = await agents.Runner.run(triage, "Write a poem.", max_turns=3)
    check(result.last_agent is poet, f"the last agent is {result.last_agent.name}")
    check(result.final_output, "no final text")
    kinds = [item["type"] for item in result.to_input_list()[1:] if item["type"] != "reasoning"]
    check(kinds == ["function_call", "function_call_output", "message"], kinds)
    print(f"handoff.py: handed off, {len(asked)} tools called, with openai-agents")


asyncio.run(main())

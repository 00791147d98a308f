"""A custom node for measurements, linked beside the pack: counts the UNet's evaluations, which /kindred_calls tells and sets back to 0."""

from __future__ import annotations

from typing import Any

from aiohttp import web
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from server import PromptServer

NODE_CLASS_MAPPINGS: dict[str, type] = {}
calls = 0
forward = UNetModel.forward


def counted(self: UNetModel, *args: Any, **kwargs: Any) -> Any:
    global calls
    calls += 1
    return forward(self, *args, **kwargs)


UNetModel.forward = counted


@PromptServer.instance.routes.get("/kindred_calls")
async def counts(request: web.Request) -> web.Response:
    """The count since the last question."""
    global calls
    answer, calls = calls, 0
    return web.json_response(answer)

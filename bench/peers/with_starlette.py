"""Starlette on uvicorn."""

import uvicorn
from shared import PORT, Town
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

town = Town()


async def health(_request: Request) -> JSONResponse:
    return JSONResponse({'status': 'ok'})


async def inbox(request: Request) -> JSONResponse:
    try:
        return JSONResponse(await town.inbox(request.path_params['agent']))
    except LookupError as e:
        raise HTTPException(404, str(e)) from None


async def assign(request: Request) -> JSONResponse:
    body = await request.json()
    if not isinstance(body.get('agent'), str) or not isinstance(body.get('task'), str):
        raise HTTPException(422, 'agent and task must be texts')
    try:
        return JSONResponse(await town.assign(body['agent'], body['task']), 201)
    except LookupError as e:
        raise HTTPException(404, str(e)) from None


app = Starlette(
    routes=[
        Route('/health', health),
        Route('/v1/agents/{agent}/inbox', inbox),
        Route('/v1/tasks/assign', assign, methods=['POST']),
    ]
)

uvicorn.run(app, host='127.0.0.1', port=PORT, log_level='warning', access_log=False)

"""aiohttp's own server, on uvloop, as uvicorn uses it."""

import uvloop
from aiohttp import web
from shared import PORT, Town

routes = web.RouteTableDef()
town = Town()


@routes.get('/health')
async def health(_request: web.Request) -> web.Response:
    return web.json_response({'status': 'ok'})


@routes.get('/v1/agents/{agent}/inbox')
async def inbox(request: web.Request) -> web.Response:
    try:
        return web.json_response(await town.inbox(request.match_info['agent']))
    except LookupError as e:
        raise web.HTTPNotFound(text=str(e)) from None


@routes.post('/v1/tasks/assign')
async def assign(request: web.Request) -> web.Response:
    body = await request.json()
    if not isinstance(body.get('agent'), str) or not isinstance(body.get('task'), str):
        raise web.HTTPUnprocessableEntity(text='agent and task must be texts')
    try:
        return web.json_response(await town.assign(body['agent'], body['task']), status=201)
    except LookupError as e:
        raise web.HTTPNotFound(text=str(e)) from None


app = web.Application()
app.add_routes(routes)
web.run_app(app, host='127.0.0.1', port=PORT, access_log=None, print=None, loop=uvloop.new_event_loop())

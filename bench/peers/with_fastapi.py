"""FastAPI on uvicorn."""

import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field
from shared import PORT, Assigned, Inbox, Town

app = FastAPI()
town = Town()


class Assignment(BaseModel):
    agent: str = Field(pattern='^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$')
    task: str = Field(min_length=1, max_length=65536)


@app.get('/health')
async def health() -> dict[str, str]:
    return {'status': 'ok'}


@app.get('/v1/agents/{agent}/inbox')
async def inbox(agent: str) -> Inbox:
    try:
        return await town.inbox(agent)
    except LookupError as e:
        raise HTTPException(404, str(e)) from None


@app.post('/v1/tasks/assign', status_code=201)
async def assign(body: Assignment) -> Assigned:
    try:
        return await town.assign(body.agent, body.task)
    except LookupError as e:
        raise HTTPException(404, str(e)) from None


uvicorn.run(app, host='127.0.0.1', port=PORT, log_level='warning', access_log=False)

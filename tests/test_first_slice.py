"""A minimal end-to-end test: spawn an agent over REST, assign a task, see it completed."""

from __future__ import annotations

from .support import Hall, Place


def test_an_agent_spawned_over_rest_completes_a_task(place: Place, hall: Hall) -> None:
    spawned = hall.post('/v1/agents', {'name': 'backend', 'cli': 'demo'})
    assert spawned.status == 201
    assigned = hall.post('/v1/tasks/assign', {'agent': 'backend', 'task': 'say hello'})
    assert assigned.status == 201
    assert assigned.json['agent_name'] == 'backend'
    task = place.await_end(assigned.json['task_id'])
    assert task['state'] == 'completed'
    assert task['attempt'] == 1
    assert 'say hello' in task['result']
    assert hall.get(f'/v1/tasks/{task["task_id"]}').json == task

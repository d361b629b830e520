// Fastify with ioredis.
'use strict';

const { randomUUID } = require('node:crypto');
const { readFileSync } = require('node:fs');
const fastify = require('fastify');
const { Redis } = require('ioredis');

const [port, file] = process.argv.slice(2);
const settings = JSON.parse(readFileSync(file, 'utf8'));
const context = ['', '', 'local', settings.events]; // the arguments that precede a script's own

const redis = new Redis({ path: settings.socket });
redis.defineCommand('inbox', { numberOfKeys: 1, lua: settings.inbox });
redis.defineCommand('assign', { numberOfKeys: 1, lua: settings.assign });

const text = { type: 'string' };
const number = { type: 'integer' };
const object = (properties) => ({ type: 'object', properties });
const message = object({ id: text, from: text, type: text, summary: text });

const app = fastify();

function unwrap([done, ...reply]) {
  if (!done) throw Object.assign(new Error(String(reply)), { statusCode: 404 });
  return reply;
}

app.get('/health', { schema: { response: { 200: object({ status: text }) } } }, async () => ({ status: 'ok' }));

app.get(
  '/v1/agents/:agent/inbox',
  {
    schema: {
      response: {
        200: object({ agent: text, total: number, urgent: number, messages: { type: 'array', items: message } }),
      },
    },
  },
  async (request) => {
    const [agent, total, urgent, , messages] = unwrap(
      await redis.inbox(settings.prefix, ...context, request.params.agent, 500, ''),
    );
    return { agent, total, urgent, messages: JSON.parse(`[${messages}]`) };
  },
);

app.post(
  '/v1/tasks/assign',
  {
    schema: {
      body: { ...object({ agent: text, task: text }), required: ['agent', 'task'] },
      response: { 201: object({ task_id: text, agent_id: text, agent_name: text }) },
    },
  },
  async (request, reply) => {
    const { agent, task } = request.body;
    const id = randomUUID();
    const head = JSON.stringify({ task_id: id, description: task }).slice(0, -1);
    const record = [id, head, JSON.stringify(task), '[]', settings.conductor, 3];
    const [task_id, agent_id, agent_name] = unwrap(await redis.assign(settings.prefix, ...context, agent, ...record));
    reply.code(201);
    return { task_id, agent_id, agent_name };
  },
);

app.listen({ host: '127.0.0.1', port: Number(port) });

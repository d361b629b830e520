-- Sets the request that wrk sends (arguments: method, JSON body or '', API key or ''); prints the result as JSON.

function init(arguments)
  wrk.method = arguments[1]
  if arguments[2] ~= '' then
    wrk.body = arguments[2]
    wrk.headers['Content-Type'] = 'application/json'
  end
  if arguments[3] ~= '' then
    wrk.headers['Authorization'] = 'Bearer ' .. arguments[3]
  end
end

function done(summary, latency)
  local lost = summary.errors
  io.write(string.format(
    '\n{"requests":%d,"seconds":%f,"bytes":%d,"p50":%f,"p99":%f,"refused":%d,"lost":%d}\n',
    summary.requests, summary.duration / 1e6, summary.bytes,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    lost.status, lost.connect + lost.read + lost.write + lost.timeout))
end

// An OpenID provider on loopback: oidc-provider, whose client `ci` is given JWT access tokens for urn:town (with the
// algorithm that the first key has) and for urn:other, and opaque ones for urn:opaque.
// Arguments: the port (0: a free one), and the private keys as a JWK set.
import http from 'node:http'
import { Provider } from 'oidc-provider'

const [port, jwks] = [Number(process.argv[2]), JSON.parse(process.argv[3])]
const scope = 'town.read town.write agent.manage admin town.readx'
const server = http.createServer()

server.listen(port, '127.0.0.1', () => {
  const issuer = `http://127.0.0.1:${server.address().port}`
  const provider = new Provider(issuer, {
    jwks,
    clients: [
      {
        client_id: 'ci',
        client_secret: 'not-a-secret',
        grant_types: ['client_credentials'],
        redirect_uris: [],
        response_types: [],
        token_endpoint_auth_method: 'client_secret_post',
        id_token_signed_response_alg: jwks.keys[0].alg,
      },
    ],
    scopes: scope.split(' '),
    features: {
      clientCredentials: { enabled: true },
      devInteractions: { enabled: false },
      resourceIndicators: {
        enabled: true,
        getResourceServerInfo: (_ctx, resource) => ({
          scope,
          audience: resource,
          accessTokenFormat: resource === 'urn:opaque' ? 'opaque' : 'jwt',
          jwt: { sign: { alg: jwks.keys[0].alg } },
        }),
      },
    },
  })
  server.on('request', provider.callback())
  console.log(`ready ${issuer}`)
})

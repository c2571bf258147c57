// A node upstream that says what it read: one JSON line for each request, then a short answer.
'use strict';
const http = require('node:http');

const say = (line) => process.stdout.write(JSON.stringify(line) + '\n', 'latin1');

const server = http.createServer((request, response) => {
  const pieces = [];
  const seen = () => ({
    method: request.method,
    target: request.url,
    body: Buffer.concat(pieces).toString('latin1'),
    fields: Object.keys(request.headers),
  });
  request.on('data', (piece) => pieces.push(piece));
  request.on('error', () => say({ ...seen(), whole: false }));
  request.on('end', () => {
    say({ ...seen(), whole: true });
    response.setHeader('X-Read', `${request.method} ${request.url}`);
    response.end('ok\n');
  });
});
server.on('clientError', (error, socket) => {
  // Some callers leave before their request's end; everything else is bytes that were no request.
  if (!['ECONNRESET', 'HPE_INVALID_EOF_STATE'].includes(error.code)) say({ garbage: error.code });
  socket.end('HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n');
});
server.keepAliveTimeout = 300_000; // the proxy closes first
server.listen(Number(process.argv[2]), '127.0.0.1');

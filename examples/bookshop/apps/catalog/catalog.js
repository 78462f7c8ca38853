// The catalogue: books by HTTP/1.1 (Node, nothing but its standard library).
//
//   GET /books          all books, JSON
//   GET /books/ISBN     one book; 404 when there is none
//   GET /healthz        for the kubelet
//
// FAIL_PERCENT makes that share of the answers a 503, SLOW_MS delays every answer: for trying
// policies.
'use strict';
const http = require('http');

const books = [
  { isbn: '9780131103627', title: 'The C Programming Language', author: 'Kernighan and Ritchie', price: 4999 },
  { isbn: '9780262510875', title: 'Structure and Interpretation of Computer Programs', author: 'Abelson and Sussman', price: 5500 },
  { isbn: '9781718503106', title: 'The Rust Programming Language', author: 'Klabnik and Nichols', price: 3995 },
];
const failPercent = Number(process.env.FAIL_PERCENT || 0);
const slow = Number(process.env.SLOW_MS || 0);

function answer(status, body) {
  const text = JSON.stringify(body) + '\n';
  return [status, { 'Content-Type': 'application/json', 'Content-Length': Buffer.byteLength(text) }, text];
}

function route(request) {
  if (request.url === '/healthz') return answer(200, 'ok');
  if (Math.random() * 100 < failPercent) return answer(503, { error: 'as FAIL_PERCENT asks for' });
  if (request.url === '/books') return answer(200, books);
  const book = books.find((book) => request.url === '/books/' + book.isbn);
  return book ? answer(200, book) : answer(404, { error: 'no such book' });
}

const server = http.createServer((request, response) => {
  request.resume();
  const [status, headers, text] = route(request);
  setTimeout(() => {
    response.writeHead(status, headers);
    response.end(text);
  }, request.url === '/healthz' ? 0 : slow);
});
server.listen(8080, () => console.log('the catalogue listens on 8080'));
process.on('SIGTERM', () => {
  server.close(() => process.exit(0));
  server.closeIdleConnections();
});

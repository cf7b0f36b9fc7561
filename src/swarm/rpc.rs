//! `/helion/rpc/1`: one request, one response, for everything but steps.
//!
//! A message on the wire is a `u32` LE length and the protobuf message of `proto/rpc.proto`. Requests are small questions;
//! a response may carry a swarm's announcements.

use std::io;

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::{StreamProtocol, request_response};
use prost::Message;

use super::{frame::read_growing, proto::rpc};

pub use super::proto::rpc::{Request, Response, request, response};

/// Its name on the wire.
pub const PROTOCOL: StreamProtocol = StreamProtocol::new("/helion/rpc/1");
/// A question is short; the largest is a probe's payload.
pub const MAX_REQUEST_BYTES: usize = 64 * 1024;
/// Room for the announcements of some thousand peers.
pub const MAX_RESPONSE_BYTES: usize = 4 * 1024 * 1024;

impl Request {
    /// What does this node serve right now?
    pub fn info() -> Self {
        Self { body: Some(request::Body::Info(rpc::InfoRequest {})) }
    }

    /// Which announcements do you know under this prefix?
    pub fn exchange(dht_prefix: &str) -> Self {
        Self { body: Some(request::Body::Exchange(rpc::ExchangeRequest { dht_prefix: dht_prefix.to_owned() })) }
    }

    /// Leave, please.
    pub fn drain(request: rpc::DrainRequest) -> Self {
        Self { body: Some(request::Body::Drain(request)) }
    }

    /// Send this back.
    pub fn probe(payload: impl Into<bytes::Bytes>) -> Self {
        Self { body: Some(request::Body::Probe(rpc::ProbeRequest { payload: payload.into() })) }
    }
}

impl Response {
    /// The request was not done, and why.
    pub fn failure(message: impl Into<String>) -> Self {
        Self { body: Some(response::Body::Failure(rpc::Failure { message: message.into() })) }
    }
}

/// Reads and writes the messages.
#[derive(Debug, Clone, Default)]
pub struct Codec;

impl request_response::Codec for Codec {
    type Protocol = StreamProtocol;
    type Request = Request;
    type Response = Response;

    async fn read_request<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Request>
    where
        T: AsyncRead + Unpin + Send,
    {
        read_message(io, MAX_REQUEST_BYTES).await
    }

    async fn read_response<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Response>
    where
        T: AsyncRead + Unpin + Send,
    {
        read_message(io, MAX_RESPONSE_BYTES).await
    }

    async fn write_request<T>(&mut self, _: &StreamProtocol, io: &mut T, request: Request) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        write_message(io, &request, MAX_REQUEST_BYTES).await
    }

    async fn write_response<T>(&mut self, _: &StreamProtocol, io: &mut T, response: Response) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        write_message(io, &response, MAX_RESPONSE_BYTES).await
    }
}

fn too_large(bytes: usize, limit: usize) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("a message of {bytes} bytes is over the limit of {limit}"))
}

async fn read_message<M, T>(io: &mut T, limit: usize) -> io::Result<M>
where
    M: Message + Default,
    T: AsyncRead + Unpin + Send,
{
    let mut prefix = [0; 4];
    io.read_exact(&mut prefix).await?;
    let bytes = u32::from_le_bytes(prefix) as usize;
    if bytes > limit {
        return Err(too_large(bytes, limit));
    }
    let mut buffer = Vec::new();
    read_growing(io, bytes, &mut buffer, &mut ()).await?;
    M::decode(bytes::Bytes::from(buffer)).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

async fn write_message<M, T>(io: &mut T, message: &M, limit: usize) -> io::Result<()>
where
    M: Message,
    T: AsyncWrite + Unpin + Send,
{
    let bytes = message.encoded_len();
    let prefix = match u32::try_from(bytes) {
        Ok(prefix) if bytes <= limit => prefix,
        _ => return Err(too_large(bytes, limit)),
    };
    let mut buffer = Vec::with_capacity(4 + bytes);
    buffer.extend_from_slice(&prefix.to_le_bytes());
    message.encode(&mut buffer)?;
    io.write_all(&buffer).await?;
    io.flush().await
}

#[cfg(test)]
mod tests {
    use futures::{executor::block_on, io::Cursor};

    use super::*;

    #[test]
    fn messages_are_read_as_they_were_written() {
        for request in [Request::info(), Request::exchange("a/b"), Request::probe(vec![7; 60_000])] {
            let mut wire = Cursor::new(Vec::new());
            block_on(write_message(&mut wire, &request, MAX_REQUEST_BYTES)).unwrap();
            wire.set_position(0);
            assert_eq!(block_on(read_message::<Request, _>(&mut wire, MAX_REQUEST_BYTES)).unwrap(), request);
        }
    }

    #[test]
    fn too_large_truncated_and_garbage_are_errors() {
        let read =
            |bytes: &[u8]| block_on(read_message::<Request, _>(&mut Cursor::new(bytes.to_vec()), 100)).unwrap_err();
        assert_eq!(read(&[101, 0, 0, 0]).kind(), io::ErrorKind::InvalidData);
        assert_eq!(read(&[10, 0, 0, 0, 1]).kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(read(&[2, 0, 0, 0, 0xff, 0xff]).kind(), io::ErrorKind::InvalidData);
        let large = Request::probe(vec![0; 200]);
        assert!(block_on(write_message(&mut Cursor::new(Vec::new()), &large, 100)).is_err());
    }
}

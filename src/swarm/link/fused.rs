//! A stream that isn't touched again after reading from it has failed.
//!
//! libp2p's lazily negotiated streams settle the protocol on the first read, and panic when they are polled after that has
//! failed. The two halves of a link are polled by two tasks, and when the reader gets the error the writer doesn't know of it
//! yet. A failed write is another matter: what the peer sent before is still there to be read.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use futures::{AsyncRead, AsyncWrite};

pub(super) struct Fused<S> {
    stream: S,
    failed: bool,
}

impl<S: Unpin> Fused<S> {
    pub(super) fn new(stream: S) -> Self {
        Self { stream, failed: false }
    }

    /// The stream, if it may be polled.
    fn usable(&mut self) -> io::Result<Pin<&mut S>> {
        if self.failed { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(Pin::new(&mut self.stream)) }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Fused<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let result = self.usable()?.poll_read(cx, buffer);
        self.failed = matches!(result, Poll::Ready(Err(_)));
        result
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Fused<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.usable()?.poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.usable()?.poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.usable()?.poll_close(cx)
    }
}

//! The wire types, generated from `proto/`.
#![allow(missing_docs, unreachable_pub)] // the schema files document them

/// Announcements and what the DHT stores.
pub mod announcement {
    include!(concat!(env!("OUT_DIR"), "/helion.announcement.rs"));
}
/// `/helion/rpc/1`.
pub mod rpc {
    include!(concat!(env!("OUT_DIR"), "/helion.rpc.rs"));
}
/// `/helion/session/1`.
pub mod session {
    include!(concat!(env!("OUT_DIR"), "/helion.session.rs"));
}

use crate::model;

impl From<model::Dtype> for announcement::Dtype {
    fn from(dtype: model::Dtype) -> Self {
        match dtype {
            model::Dtype::F32 => Self::F32,
            model::Dtype::Bf16 => Self::Bf16,
            model::Dtype::F16 => Self::F16,
        }
    }
}

/// The peer named a dtype that this version doesn't know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the peer named a dtype that this version of helion doesn't know")]
pub struct UnknownWireDtype;

impl TryFrom<announcement::Dtype> for model::Dtype {
    type Error = UnknownWireDtype;

    fn try_from(dtype: announcement::Dtype) -> Result<Self, UnknownWireDtype> {
        match dtype {
            announcement::Dtype::F32 => Ok(Self::F32),
            announcement::Dtype::Bf16 => Ok(Self::Bf16),
            announcement::Dtype::F16 => Ok(Self::F16),
            announcement::Dtype::Unspecified => Err(UnknownWireDtype),
        }
    }
}

//! Certificate serial numbers (RFC 5280, section 4.1.2.2).

use std::fmt;
use std::str::FromStr;

/// Why bytes or text are not a serial number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SerialError {
    /// More than 20 bytes.
    #[error("serial number is longer than 20 bytes")]
    TooLong,
    /// The encoded integer has its sign bit set.
    #[error("serial number is negative")]
    Negative,
    /// Something else than decimal digits.
    #[error("serial number is not a decimal number")]
    NotDecimal,
}

const SIZE: usize = 20;

/// A serial number of at most 20 bytes; its text form is decimal, as SPIRE shows and stores it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Serial([u8; SIZE]);

impl Serial {
    /// Reads an unsigned big-endian number; leading zeros do not count.
    pub fn from_be_bytes(bytes: &[u8]) -> Result<Self, SerialError> {
        let first = bytes.iter().position(|byte| *byte != 0).unwrap_or(bytes.len());
        let digits = bytes.get(first..).unwrap_or_default();
        let start = SIZE.checked_sub(digits.len()).ok_or(SerialError::TooLong)?;
        let mut serial = [0; SIZE];
        if let Some(tail) = serial.get_mut(start..) {
            tail.copy_from_slice(digits);
        }
        Ok(Self(serial))
    }

    /// Reads the content of a DER INTEGER.
    pub fn from_der_integer(content: &[u8]) -> Result<Self, SerialError> {
        match content.first() {
            Some(first) if first & 0x80 != 0 => Err(SerialError::Negative),
            _ => Self::from_be_bytes(content),
        }
    }

    /// Reads decimal digits.
    pub fn parse_decimal(text: &str) -> Result<Self, SerialError> {
        if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
            return Err(SerialError::NotDecimal);
        }
        let mut serial = [0_u8; SIZE];
        for digit in text.bytes() {
            let mut carry = u16::from(digit - b'0');
            for byte in serial.iter_mut().rev() {
                let product = u16::from(*byte) * 10 + carry;
                *byte = product.to_le_bytes()[0];
                carry = product >> 8;
            }
            if carry != 0 {
                return Err(SerialError::TooLong);
            }
        }
        Ok(Self(serial))
    }

    /// The number as big-endian bytes without leading zeros; zero is one byte.
    pub fn as_be_bytes(&self) -> &[u8] {
        let first = self.0.iter().position(|byte| *byte != 0).unwrap_or(SIZE - 1);
        self.0.get(first..).unwrap_or_default()
    }

    /// Lower-case hexadecimal with an even number of digits.
    pub fn to_hex(&self) -> String {
        crate::hex(self.as_be_bytes())
    }
}

impl From<u128> for Serial {
    fn from(number: u128) -> Self {
        let mut serial = [0; SIZE];
        if let Some(tail) = serial.last_chunk_mut::<16>() {
            *tail = number.to_be_bytes();
        }
        Self(serial)
    }
}

impl FromStr for Serial {
    type Err = SerialError;

    fn from_str(text: &str) -> Result<Self, SerialError> {
        Self::parse_decimal(text)
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What we make has 16 bytes, and every call of an agent compares it.
        if let Some((&[0, 0, 0, 0], low)) = self.0.split_first_chunk()
            && let Some(low) = low.first_chunk()
        {
            return fmt::Display::fmt(&u128::from_be_bytes(*low), f);
        }
        let mut rest = self.0;
        // 20 bytes are at most 49 decimal digits.
        let mut digits = Vec::with_capacity(49);
        loop {
            let mut remainder = 0_u16;
            for byte in &mut rest {
                let part = (remainder << 8) | u16::from(*byte);
                *byte = (part / 10).to_le_bytes()[0];
                remainder = part % 10;
            }
            digits.push(char::from(b'0' + remainder.to_le_bytes()[0]));
            if rest.iter().all(|byte| *byte == 0) {
                break;
            }
        }
        f.pad_integral(true, "", &digits.iter().rev().collect::<String>())
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Serial({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimal_form_is_exact_at_the_edges() {
        assert_eq!(Serial::from(0).to_string(), "0");
        assert_eq!(Serial::from(u128::MAX).to_string(), u128::MAX.to_string());
        let largest = Serial::from_be_bytes(&[0xff; 20]).unwrap();
        assert_eq!(largest.to_string(), "1461501637330902918203684832716283019655932542975");
        assert_eq!(Serial::parse_decimal(&largest.to_string()).unwrap(), largest);
        let beyond = "1461501637330902918203684832716283019655932542976";
        assert_eq!(Serial::parse_decimal(beyond), Err(SerialError::TooLong));
    }

    #[test]
    fn what_is_no_number_is_refused() {
        for text in ["", " 1", "-1", "+1", "1e3", "0x1", "１"] {
            assert_eq!(Serial::parse_decimal(text), Err(SerialError::NotDecimal), "{text:?}");
        }
        assert_eq!(Serial::from_be_bytes(&[1; 21]), Err(SerialError::TooLong));
        assert_eq!(Serial::from_der_integer(&[0x80]), Err(SerialError::Negative));
    }

    #[test]
    fn bytes_and_hexadecimal_have_no_needless_zeros() {
        let serial = Serial::from_der_integer(&[0, 0x80, 1]).unwrap();
        assert_eq!(serial.as_be_bytes(), [0x80, 1]);
        assert_eq!(serial.to_hex(), "8001");
        assert_eq!(Serial::from(5).to_hex(), "05");
        assert_eq!(Serial::from(0).as_be_bytes(), [0]);
    }
}
